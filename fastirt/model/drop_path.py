"""Stochastic depth with masks drawn outside the model, keyed by (seed, step, batch position)."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from fastirt.config.random_streams import drop_path_stream


class MaskTable:
    """The masks of one step for all layers of a model.

    Attributes:
        rates: drop probability of each layer.
        masks: (layers, B) float32, 0 or 1 / keep probability; None before the first draw.
    """

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.masks: Optional[Tensor] = None

    def draw(
        self,
        seed: int,
        step: int,
        batch_size: int,
        stream: str,
        device: torch.device,
        first: int = 0,
        count: Optional[int] = None,
    ) -> None:
        """Draw for the global batch and keep the columns first .. first + count.

        The device buffer keeps its address while its shape is the same, as a CUDA graph needs.
        """
        if not self.rates:
            return
        generator = drop_path_stream(seed, step, stream)
        keep = 1 - np.asarray(self.rates, dtype=np.float32)
        chosen = generator.random((batch_size, len(keep)), dtype=np.float32)[
            first : None if count is None else first + count
        ]
        masks = torch.from_numpy(
            np.ascontiguousarray(np.where(chosen < keep, 1 / np.maximum(keep, 1e-6), 0).astype(np.float32).T)
        )
        if self.masks is None or self.masks.shape != masks.shape or self.masks.device != device:
            self.masks = torch.empty_like(masks, device=device)
        if device.type == "cuda":
            masks = masks.pin_memory()
        self.masks.copy_(masks, non_blocking=True)


class MaskedDropPath(nn.Module):
    """Scales each sample's residual branch by its mask; the identity in evaluation.

    The distribution is that of timm's DropPath.
    """

    def __init__(self, table: MaskTable, rate: float) -> None:
        super().__init__()
        self.table, self.row = table, len(table.rates)
        table.rates.append(rate)

    def forward(self, x: Tensor) -> Tensor:  # (B, ...)
        if not self.training:
            return x
        return x * self.table.masks[self.row].view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.table.rates[self.row]:.3f}"


def replace_drop_paths(model: nn.Module) -> MaskTable:
    """Replace each timm DropPath with a rate above 0 by a MaskedDropPath; returns their table."""
    table = MaskTable()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath) and child.drop_prob:
                setattr(parent, name, MaskedDropPath(table, child.drop_prob))
    return table
