"""Resize and crop as in torchvision: the whole image is resized, then a square is cropped.

So an image can be resized once and cached; every later view is a crop of the same pixels.
"""

from __future__ import annotations

import numpy as np

from fastirt.config.options import RESIZES, InputConfig
from fastirt.config.validate import check_number
from fastirt.errors import UserError

MAX_ASPECT = 256  # longer side / shorter side


def check_input(config: InputConfig) -> None:
    """Raises UserError for sizes that allow no crop, and for an unknown resize."""
    check_number("input_size", config.input_size)
    if config.resize_size < config.input_size:
        raise UserError(
            f"--resize-size {config.resize_size} is smaller than --input-size {config.input_size}: "
            f"no crop of that size fits; pass --resize-size {round(config.input_size * 256 / 224)}"
        )
    if config.resize not in RESIZES:
        raise UserError(f"--resize {config.resize}: must be {' or '.join(RESIZES)}")


def resized_size(height: int, width: int, resize: str, side: int) -> tuple[int, int]:
    """(height, width) after torchvision's Resize.

    resize: "square", or "shorter" for the shorter side to `side` pixels and the longer one rounded
    down.
    """
    if resize == "square":
        return side, side
    if width <= height:
        return side * height // width, side
    return side, side * width // height


def crop_offset(resized: int, size: int, draw: float | None) -> int:
    """First row or column of the crop for a draw in [0, 1); None: torchvision's CenterCrop."""
    if draw is None:
        return round((resized - size) / 2)
    return int(draw * (resized - size + 1))


def resized_sizes(sizes: list[tuple[int, int]], config: InputConfig) -> np.ndarray:
    """(B, 2) int64 height and width after the resize of images with the given (height, width)."""
    return np.array([resized_size(*size, config.resize, config.resize_size) for size in sizes], np.int64).reshape(-1, 2)


def crop_corners(
    resized: np.ndarray, size: int, x: np.ndarray | None = None, y: np.ndarray | None = None
) -> np.ndarray:
    """(B, 2) int64 top and left of the crops.

    resized: (B, 2) height and width. x, y: (B,) draws in [0, 1); None: the center.
    """
    corners = np.empty((len(resized), 2), np.int64)
    for i, (height, width) in enumerate(resized.tolist()):
        corners[i, 0] = crop_offset(height, size, None if y is None else y[i])
        corners[i, 1] = crop_offset(width, size, None if x is None else x[i])
    return corners


def check_shape(height: int, width: int, resize: str) -> None:
    """Raises ValueError for a strip that would become enormous with --resize shorter."""
    if resize == "shorter" and max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{width} x {height} pixels: more than {MAX_ASPECT} times as long as wide, too long for --resize shorter"
        )
