"""Resize and crop as one step: the window of the source picture that the crop shows.

PIL and torchvision resize the whole picture, then cut a square of S pixels out of it. Resizing only the matching window of the
source gives the same pixels and costs less. The window has fractional edges; the crop offset in the resized picture is a whole pixel.
"""

from __future__ import annotations

import numpy as np

from fastirt.config import InputConfig
from fastirt.errors import UserError


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


def source_windows(
    sizes: list[tuple[int, int]], config: InputConfig, x: np.ndarray | None = None, y: np.ndarray | None = None
) -> np.ndarray:
    """(B, 4) float64 (top, left, bottom, right) in source pixels, for sizes (height, width) and draws x, y (None: centre)."""
    windows = np.empty((len(sizes), 4))
    for i, (height, width) in enumerate(sizes):
        tall, wide = resized_size(height, width, config.resize, config.resize_size)
        top = crop_offset(tall, config.input_size, None if y is None else y[i])
        left = crop_offset(wide, config.input_size, None if x is None else x[i])
        windows[i, 0::2] = top * height / tall, (top + config.input_size) * height / tall
        windows[i, 1::2] = left * width / wide, (left + config.input_size) * width / wide
    return windows
