"""The random part of a training image's view: where it is cropped, and whether it is flipped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastirt.config.random_streams import Purpose, stream


@dataclass(frozen=True)
class Crops:
    """One draw for each position of a batch: x, y (B,) float64 in [0, 1), flip (B,) bool."""

    x: np.ndarray
    y: np.ndarray
    flip: np.ndarray

    def __getitem__(self, positions: slice) -> "Crops":
        return Crops(self.x[positions], self.y[positions], self.flip[positions])


def draw_crops(seed: int, step: int, batch_size: int) -> Crops:
    """Draws that are a function of (seed, step, position), whatever the batch size.

    Flips have p = 0.5.
    """
    draws = stream(seed, Purpose.CROPS, step).random((batch_size, 3))
    return Crops(draws[:, 0], draws[:, 1], draws[:, 2] < 0.5)
