"""Resize and crop, as PIL and torchvision do it: the whole image is resized, then a square of S whole pixels is cut out.

So what is cut can be kept: an image is resized once, and every later view of it is a crop of the same pixels.
"""

from __future__ import annotations

import numpy as np

from fastirt.config.options import InputConfig
from fastirt.errors import UserError

MAX_ASPECT = 256


def check_input(config: InputConfig) -> None:
    """Raises UserError for sizes from which no crop can be taken."""
    if config.input_size < 1:
        raise UserError(f"--input-size {config.input_size}: must be at least 1")
    if config.resize_size < config.input_size:
        raise UserError(
            f"--resize-size {config.resize_size} is smaller than --input-size {config.input_size}: no crop of that size fits; "
            f"give --resize-size {round(config.input_size * 256 / 224)}"
        )
    if config.resize not in ("square", "shorter"):
        raise UserError(f"--resize {config.resize}: must be square or shorter")


def resized_size(height: int, width: int, resize: str, side: int) -> tuple[int, int]:
    """(height, width) after torchvision's Resize: to a `square`, or the `shorter` side to `side` pixels and the longer one floored."""
    if resize == "square":
        return side, side
    if width <= height:
        return side * height // width, side
    return side, side * width // height


def crop_offset(resized: int, size: int, draw: float | None) -> int:
    """First row or column of the crop: floor(draw · choices), or the centre as torchvision's CenterCrop rounds it."""
    if draw is None:
        return round((resized - size) / 2)
    return int(draw * (resized - size + 1))


def resized_sizes(sizes: list[tuple[int, int]], config: InputConfig) -> np.ndarray:
    """(B, 2) int64 (height, width) after the resize, for sizes (height, width)."""
    return np.array([resized_size(*size, config.resize, config.resize_size) for size in sizes], np.int64).reshape(-1, 2)


def crop_corners(
    resized: np.ndarray, size: int, x: np.ndarray | None = None, y: np.ndarray | None = None
) -> np.ndarray:
    """(B, 2) int64 (top, left) of the crops in resized images (B, 2), for draws x, y (None: centre)."""
    corners = np.empty((len(resized), 2), np.int64)
    for i, (height, width) in enumerate(resized.tolist()):
        corners[i, 0] = crop_offset(height, size, None if y is None else y[i])
        corners[i, 1] = crop_offset(width, size, None if x is None else x[i])
    return corners


def check_shape(height: int, width: int, resize: str) -> None:
    """Raises ValueError for a strip that would become enormous when its shorter side is resized."""
    if resize == "shorter" and max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{width} x {height} pixels: more than {MAX_ASPECT} times as long as wide, too long for --resize shorter"
        )
