"""The decoded cache: each image of a split is decoded and resized once, then kept as uint8.

A training view of an image is a crop of it, which the step copies with
`fastirt.kernels.gather_views`.
"""

from __future__ import annotations

import logging
import weakref
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from fastirt.errors import UserError

log = logging.getLogger("fastirt")


class ImageCache:
    """Memory for the P images of a split, one after the other in catalogue order.

    Args:
        shapes: (P, 2) int64 (height, width) of each image after the resize; (0, 0) if unreadable.
        device: the device that gathers the views.
        place: "device" or "host": where the pixels are kept.

    Attributes:
        pixels: (bytes,) uint8, on the device or in host memory, page-locked beside a GPU.
        starts, widths: (P,) int64 on the device: where in `pixels` an image begins, and its width.
        valid: (P,) bool on the host: which images are in `pixels`; none at first.
        remote: whether a GPU reads `pixels` across the bus.

    Raises:
        UserError: the images do not fit.
    """

    def __init__(self, shapes: np.ndarray, device: torch.device, place: str) -> None:
        sizes = shapes.prod(1) * 3
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self.shapes, self.valid, self.place = shapes, np.zeros(len(shapes), bool), place
        self._starts = starts[:-1]
        self.remote = place == "host" and device.type == "cuda"
        where = device if place == "device" else torch.device("cpu")
        try:
            # Up to whole words of four bytes, or `gather_views` would read the last one by bytes.
            room = torch.empty(-(-int(starts[-1]) // 4) * 4, dtype=torch.uint8, device=where)
            self.pixels = room[: int(starts[-1])]
            if self.remote:
                _lock(room)
                weakref.finalize(self, _unlock, room)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise UserError(
                f"--cache {place}: {starts[-1] / 2**30:.1f} GiB of images do not fit: use --cache auto or none"
            ) from error
        self.starts = torch.from_numpy(self._starts).to(device)
        self.widths = torch.from_numpy(np.ascontiguousarray(shapes[:, 1])).to(device)

    @property
    def untouched_bytes(self) -> int:
        """Memory that is promised and not in use yet: the system still counts it as free."""
        lazy = self.place == "host" and not self.remote
        return int(self.shapes[~self.valid].prod(1).sum()) * 3 if lazy else 0

    def put(self, row: int, image: Tensor) -> None:
        """Start to copy an image (H, W, 3) uint8 into the cache.

        The caller waits for the device, then sets `valid[row]`.

        Raises ValueError for another shape than `shapes[row]`.
        """
        height, width = self.shapes[row].tolist()
        if tuple(image.shape) != (height, width, 3):
            raise ValueError(f"image {row} is {tuple(image.shape)}, the cache has room for {(height, width, 3)}")
        start = int(self._starts[row])
        self.pixels[start : start + image.numel()].copy_(image.reshape(-1), non_blocking=True)


def _lock(pixels: Tensor) -> None:
    """Page-lock memory so that GPUs can read it. torch's `pin_memory` could take twice the size."""
    if pixels.numel():
        error = torch.cuda.cudart().cudaHostRegister(pixels.data_ptr(), pixels.numel(), 0)
        if int(error):
            raise RuntimeError(f"cudaHostRegister: {error}")


def _unlock(pixels: Tensor) -> None:
    if pixels.numel():
        torch.cuda.cudart().cudaHostUnregister(pixels.data_ptr())


def next_missing(cache: ImageCache, after: int, count: int, bad: frozenset[int], skip: Sequence[int]) -> list[int]:
    """Up to `count` rows from `after` on, in order: not in the cache, not bad and not in `skip`."""
    rows: list[int] = []
    passed = set(skip)
    for row in np.flatnonzero(~cache.valid[after:]) + after:
        if len(rows) == count:
            break
        if int(row) not in bad and int(row) not in passed:
            rows.append(int(row))
    return rows
