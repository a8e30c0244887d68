"""Cross-batch memory (Wang et al. 2020): a ring of past embeddings and their labels, static on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Written(NamedTuple):
    """What one write replaced, so that it can be taken back without asking the host."""

    slots: Tensor  # (B,) int64
    embeddings: Tensor  # (B, D) before the write
    labels: Tensor  # (B,) int64 before the write


class Memory(nn.Module):
    """A ring of `size` embeddings of `dim` numbers; label -1 marks an empty slot.

    A batch goes to the slots (pointer + arange(B)) mod size, so it wraps in its middle and the newest entries are
    never lost. Nothing here waits for the device.
    """

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("labels", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    @torch.no_grad()
    def write(self, embeddings: Tensor, labels: Tensor) -> Written:
        """Store a batch (B, D) with its labels (B,). Raises ValueError where B exceeds the size of the ring."""
        count = embeddings.shape[0]
        if count > len(self):
            raise ValueError(f"a batch of {count} does not fit into a memory of {len(self)}")
        slots = (self.pointer + torch.arange(count, device=self.pointer.device)) % len(self)
        written = Written(slots, self.embeddings[slots], self.labels[slots])
        self.embeddings[slots] = embeddings.detach().to(self.embeddings.dtype)
        self.labels[slots] = labels
        self.pointer.copy_((self.pointer + count) % len(self))
        return written

    @torch.no_grad()
    def undo(self, written: Written, when: Tensor) -> None:
        """Take the last write back where the 0-d bool tensor `when` is true; no synchronisation."""
        self.embeddings[written.slots] = torch.where(when, written.embeddings, self.embeddings[written.slots])
        self.labels[written.slots] = torch.where(when, written.labels, self.labels[written.slots])
        self.pointer.copy_(torch.where(when, written.slots[0], self.pointer))
