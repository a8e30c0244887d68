"""A batch of training or evaluation images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastirt.loading.image_cache import ImageViews

if TYPE_CHECKING:
    pass


@dataclass
class Batch:
    """images (B, S, S, 3) uint8 and labels (B,) int64 on the device; indices (B,) int64 rows of the split; rows from `valid` on are
    padding: black, with label and index -1. Where images are cached, `views` says which and how cropped, and images is None.
    With many ranks this is one's slice; `whole` is then the rows of the batch of all."""

    images: torch.Tensor | None
    labels: torch.Tensor
    indices: np.ndarray
    step: int
    valid: int
    views: ImageViews | None = None
    whole: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def size(self) -> int:
        """S, in pixels."""
        return self.views.size if self.images is None else self.images.shape[1]

    def pixels(self) -> torch.Tensor:
        """(B, S, S, 3) uint8, wherever they are kept."""
        return self.views.pixels() if self.images is None else self.images
