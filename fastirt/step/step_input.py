"""The step's input: static buffers on the device, so that a captured step finds every batch at the
same address.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from fastirt.images.normalize import byte_table, whole_views
from fastirt.kernels.gather import gather_views, look_up
from fastirt.loading.batch import Batch


class StepInput:
    """`load` brings a batch in, from the host's side; `fill` turns it into the encoder's input, on
    the device alone.

    images (B, 3, S, S) in channels-last memory and labels (B,) int64 keep their address while the
    batch's shape stays the same.
    """

    images: Tensor
    labels: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.table = byte_table(tuple(mean), tuple(std), dtype, device)
        self._layout: tuple | None = None

    def copy_batch(self, batch: Batch) -> bool:
        """Copy what is new of a batch into place, without waiting; True where the places themselves
        are new.
        """
        layout = (len(batch), batch.size, None if batch.views is None else batch.views.cache)
        moved = layout != self._layout
        if moved:
            self._layout = layout
            self._allocate(batch)
        self.labels.copy_(batch.labels, non_blocking=True)
        if batch.views is not None:
            self._picks.copy_(batch.views.picks, non_blocking=True)
        elif self.device.type == "cuda":
            self._pixels.view(batch.images.shape).copy_(batch.images, non_blocking=True)
        else:
            self._bytes = batch.images
        return moved

    def build_images(self) -> Tensor:
        """Crop, flip, normalise and cast into `images`, which is returned: one kernel on a GPU."""
        if self._bytes is not None:
            look_up(self._bytes, self.table, self._out)
        else:
            gather_views(self._out, self._pixels, self._starts, self._widths, self._picks, self.table)
        return self.images

    def _allocate(self, batch: Batch) -> None:
        count, size, device = len(batch), batch.size, self.device
        self._out = torch.empty(count, size, size, 3, dtype=self.dtype, device=device)
        self.images = self._out.permute(0, 3, 1, 2)
        self.labels = torch.empty(count, dtype=torch.int64, device=device)
        self._bytes = None
        if batch.views is not None:
            cache = batch.views.cache
            self._pixels, self._starts, self._widths = cache.pixels, cache.starts, cache.widths
            self._picks = torch.empty(count, 4, dtype=torch.int64, device=device)
        elif device.type == "cuda":
            self._pixels = torch.empty(count * size * size * 3, dtype=torch.uint8, device=device)
            self._starts, self._widths, self._picks = whole_views(count, size, device)
