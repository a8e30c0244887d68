"""The step's input: buffers that keep their address, so that a CUDA graph finds each batch."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from fastirt.images.normalize import byte_table
from fastirt.loading.augment import OwnAugmentation
from fastirt.loading.batch import Batch, ImageViews


class StepInput:
    """`copy_batch` takes a batch, outside a CUDA graph; `build_images` makes images, inside it.

    images (B, 3, S, S) in channels-last memory and labels (B,) int64 keep their address as long as
    the shape of the batch and its cache stay the same. On a GPU, so do the tensors that
    `build_images` reads.
    """

    images: Tensor
    labels: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
        augment: OwnAugmentation | None = None,
    ) -> None:
        self.dtype, self.device, self.augment = dtype, device, augment
        self.table = byte_table(tuple(mean), tuple(std), dtype, device)
        self._views: ImageViews | None = None
        self._layout: tuple[int, int, int | None] | None = None

    def copy_batch(self, batch: Batch, first: int = 0) -> bool:
        """Start to copy what differs from batch to batch; True if the buffers are new.

        A user's augmentation runs here, outside the graph. first: the position of the batch's first
        image in the batch of all ranks.
        """
        views = batch.views
        if self.augment is not None:
            views = ImageViews.whole(self.augment(batch.images, batch.step, first))
        layout = (len(batch), views.size, None if views.owned else views.pixels.data_ptr())
        moved = layout != self._layout
        if moved:
            self._layout = layout
            self._allocate(views)
        self.labels.copy_(batch.labels, non_blocking=True)
        if self.device.type == "cuda":
            self._views.per_batch.copy_(views.per_batch, non_blocking=True)
        else:
            self._views = views  # no CUDA graph: the batch is read where it is
        return moved

    def build_images(self) -> Tensor:
        """Crop, flip, normalize and cast into `images`, which is returned: one kernel on a GPU."""
        self._views.fill(self._out, self.table)
        return self.images

    def _allocate(self, views: ImageViews) -> None:
        count, size, device = len(views), views.size, self.device
        self._out = torch.empty(count, size, size, 3, dtype=self.dtype, device=device)
        self.images = self._out.permute(0, 3, 1, 2)
        self.labels = torch.empty(count, dtype=torch.int64, device=device)
        if device.type == "cuda":
            self._views = views.with_new_buffer()
