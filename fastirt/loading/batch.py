"""A batch of images for training or evaluation: labels, rows, and views of uint8 pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastirt.images.normalize import whole_views
from fastirt.kernels.gather import gather_views, look_up


@dataclass(frozen=True, eq=False)
class ImageViews:
    """B square views of stored images, as `fastirt.kernels.gather_views` takes them.

    Attributes:
        pixels: (bytes,) uint8, images (H, W, 3) one after the other, on the device or in
            page-locked host memory.
        starts, widths: (P,) int64 on the device: where image p begins in `pixels`, and its width.
        picks: (B, 4) int64 on the device: image, top, left, flip (0 or 1) of each view.
        size: S, the side of each view in pixels.
        owned: `pixels` are B images (S, S, 3) of this batch alone, each shown whole. Otherwise they
            are a cache that all batches share.
    """

    pixels: Tensor
    starts: Tensor
    widths: Tensor
    picks: Tensor
    size: int
    owned: bool = False

    @classmethod
    def whole(cls, images: Tensor) -> ImageViews:
        """images (B, S, S, 3) uint8 as they are, without a copy where they are contiguous."""
        count, size = images.shape[:2]
        return cls(images.reshape(-1), *whole_views(count, size, images.device), size, owned=True)

    def __len__(self) -> int:
        return len(self.picks)

    @property
    def per_batch(self) -> Tensor:
        """What differs from batch to batch: the pixels if they are `owned`, else the picks."""
        return self.pixels if self.owned else self.picks

    @property
    def images(self) -> Tensor:
        """(B, S, S, 3) uint8 on the device: the memory of `owned` pixels, else a copy."""
        shape = (len(self), self.size, self.size, 3)
        if self.owned:
            return self.pixels.view(shape)
        device = self.picks.device
        identity = torch.arange(256, dtype=torch.uint8, device=device)[:, None].repeat(1, 3)
        return self.fill(torch.empty(shape, dtype=torch.uint8, device=device), identity)

    def fill(self, out: Tensor, table: Tensor) -> Tensor:
        """Fill `out` (B, S, S, 3) with table[byte, channel] of each view; returns it.

        table: (256, 3) of out's dtype: what a byte becomes, by channel.
        """
        if self.owned and not out.is_cuda:  # on a CPU `gather_views` copies each view first
            return look_up(self.images, table, out)
        return gather_views(out, self.pixels, self.starts, self.widths, self.picks, table)

    def with_new_buffer(self) -> ImageViews:
        """The same, but with uninitialized memory of its own in place of `per_batch`."""
        empty = torch.empty_like(self.per_batch)
        return replace(self, pixels=empty) if self.owned else replace(self, picks=empty)


@dataclass
class Batch:
    """One rank's slice of a batch, complete on the device.

    Attributes:
        views: the B images, uint8: cached ones with a crop each, or the batch's own, whole.
        labels: (B,) int64 on the device.
        indices: (B,) int64 rows of the split, on the host.
        step: the training step that it is for; in evaluation, the number of the batch.
        valid: number of images; rows from `valid` on are padding: black, with label and index -1.
        whole: (N,) int64 rows of the batch of all ranks, in training.
    """

    views: ImageViews
    labels: Tensor
    indices: np.ndarray
    step: int
    valid: int
    whole: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def images(self) -> Tensor:
        """(B, S, S, 3) uint8 on the device; of cached images a copy is made at each access."""
        return self.views.images
