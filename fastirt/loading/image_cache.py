"""The decoded cache: each image of a split is decoded and resized once, and stays in memory as uint8.

A training view of it is then a crop, which the step's input kernel takes from here (`fastirt.kernels.gather_views`).
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from fastirt.errors import UserError
from fastirt.kernels.gather import gather_views

log = logging.getLogger("fastirt")


class ImageCache:
    """Room for the images of a split, one after the other in catalogue order, and a valid bit for each.

    pixels (bytes,) uint8, on the device or in (page-locked) host memory; starts, widths (P,) int64 on the device; shapes
    (P, 2) int64 (height, width) after the resize, (0, 0) for one that cannot be read; valid (P,) bool.
    """

    def __init__(self, shapes: np.ndarray, device: torch.device, place: str) -> None:
        """place: "device" or "host". Raises UserError where the memory is not to be had."""
        sizes = shapes.prod(1) * 3
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self.shapes, self.valid, self.place = shapes, np.zeros(len(shapes), bool), place
        self._starts = starts[:-1]
        self.remote = place == "host" and device.type == "cuda"  # read across the bus
        where = device if place == "device" else torch.device("cpu")
        try:
            self.pixels = torch.empty(int(starts[-1]), dtype=torch.uint8, device=where)
            if self.remote:
                _lock(self.pixels)
                weakref.finalize(self, _unlock, self.pixels)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise UserError(
                f"--cache {place}: {starts[-1] / 2**30:.1f} GiB of images do not fit: use --cache auto or none"
            ) from error
        self.starts = torch.from_numpy(self._starts).to(device)
        self.widths = torch.from_numpy(np.ascontiguousarray(shapes[:, 1])).to(device)

    def put(self, row: int, image: Tensor) -> None:
        """Copy an image (H, W, 3) uint8 to its place, without waiting; `valid[row]` is the caller's to set once it is there."""
        height, width = self.shapes[row].tolist()
        if tuple(image.shape) != (height, width, 3):
            raise ValueError(f"image {row} is {tuple(image.shape)}, the cache has room for {(height, width, 3)}")
        start = int(self._starts[row])
        self.pixels[start : start + image.numel()].copy_(image.reshape(-1), non_blocking=True)


def _lock(pixels: Tensor) -> None:
    """Make host memory readable by GPUs. torch's own page-locked tensors are rounded up to a power of two, here up to twice the size."""
    if pixels.numel():
        error = torch.cuda.cudart().cudaHostRegister(pixels.data_ptr(), pixels.numel(), 0)
        if int(error):
            raise RuntimeError(f"cudaHostRegister: {error}")


def _unlock(pixels: Tensor) -> None:
    if pixels.numel():
        torch.cuda.cudart().cudaHostUnregister(pixels.data_ptr())


@dataclass
class ImageViews:
    """Crops of cached images: picks (B, 4) int64 on the device, as `gather_views` takes them; S = `size`."""

    cache: ImageCache
    picks: Tensor
    size: int

    def pixels(self) -> Tensor:
        """(B, S, S, 3) uint8 on the device."""
        cache, device = self.cache, self.picks.device
        out = torch.empty(len(self.picks), self.size, self.size, 3, dtype=torch.uint8, device=device)
        identity = torch.arange(256, dtype=torch.uint8, device=device)[:, None].repeat(1, 3)
        return gather_views(out, cache.pixels, cache.starts, cache.widths, self.picks, identity)


def next_missing(cache: ImageCache, after: int, count: int, bad: frozenset[int], skip: Sequence[int]) -> list[int]:
    """Up to `count` rows from `after` on, in catalogue order, that are neither there, nor bad, nor in `skip`."""
    rows: list[int] = []
    passed = set(skip)
    for row in np.flatnonzero(~cache.valid[after:]) + after:
        if len(rows) == count:
            break
        if int(row) not in bad and int(row) not in passed:
            rows.append(int(row))
    return rows
