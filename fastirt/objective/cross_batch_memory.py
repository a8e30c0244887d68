"""Cross-batch memory (Wang et al. 2020): a ring buffer of past embeddings on the device."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from fastirt.config.options import Config
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.kernels.rounding import round_to_tf32


class Replaced(NamedTuple):
    """What one `enqueue` overwrote, for `rollback` to restore without waiting for the device."""

    slots: Tensor  # (B,) int64
    embeddings: Tensor  # (B, D), before the write
    labels: Tensor  # (B,) int64, before the write


class CrossBatchMemory(nn.Module):
    """A ring of `size` embeddings of `dim` numbers; label -1 marks an empty slot.

    A batch goes to the slots (pointer + arange(B)) mod size. One that reaches the end of the ring
    continues at its start, so no new entry is lost. No method waits for the device.

    size: slots of the whole ring.
    dim: D.
    dtype, device: of the embeddings; labels are int64.
    shard, num_shards: which of `num_shards` equal parts this process holds: the len(self) slots
        from `first` = shard * ceil(size / num_shards) on. Writes to other shards go to an extra row
        past the end, so that shapes never change.
    tf32: round float32 embeddings to tf32 when they are stored or loaded, for products that ignore
        the other bits.

    Buffers: embeddings (len(self), D), labels (len(self),), pointer (0-d int64, the next slot).
    """

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        shard: int = 0,
        num_shards: int = 1,
        tf32: bool = False,
    ) -> None:
        super().__init__()
        self._tf32 = tf32 and dtype == torch.float32
        share = -(-size // num_shards)
        self.size, self.num_shards, self.first = size, num_shards, min(size, shard * share)
        count = min(share, size - self.first)
        room = count + (num_shards > 1)
        self._vectors = torch.zeros(room, dim, dtype=dtype, device=device)
        self._labels = torch.full((room,), -1, dtype=torch.int64, device=device)
        self.register_buffer("embeddings", self._vectors[:count])
        self.register_buffer("labels", self._labels[:count])
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

    def __len__(self) -> int:
        """Slots in this shard."""
        return self.embeddings.shape[0]

    def local_rows(self, slots: Tensor) -> Tensor:
        """Rows of `embeddings` for slots of the ring; -1 for slots of other shards."""
        rows = slots - self.first
        return torch.where((rows >= 0) & (rows < len(self)), rows, -1)

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor) -> Replaced:
        """Store embeddings (B, D) with labels (B,). Raises ValueError if B exceeds `size`."""
        count = embeddings.shape[0]
        if count > self.size:
            raise ValueError(f"a batch of {count} does not fit into a memory of {self.size}")
        slots = (self.pointer + torch.arange(count, device=self.pointer.device)) % self.size
        rows = self._rows(slots)
        written = Replaced(slots, self._vectors[rows], self._labels[rows])
        vectors = embeddings.detach().to(self._vectors.dtype)
        self._put(rows, round_to_tf32(vectors) if self._tf32 else vectors, labels)
        self.pointer.copy_((self.pointer + count) % self.size)
        return written

    @torch.no_grad()
    def rollback(self, written: Replaced, when: Tensor) -> None:
        """Undo the last write if the 0-d bool tensor `when` is true."""
        rows = self._rows(written.slots)
        vectors = torch.where(when, written.embeddings, self._vectors[rows])
        self._put(rows, vectors, torch.where(when, written.labels, self._labels[rows]))
        self.pointer.copy_(torch.where(when, written.slots[0], self.pointer))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        # The kernels are promised finite vectors there.
        self.embeddings.masked_fill_((self.labels < 0)[:, None], 0)
        if self._tf32:  # a checkpoint of a run whose products take all bits
            self.embeddings.copy_(round_to_tf32(self.embeddings))

    def _rows(self, slots: Tensor) -> Tensor:
        if self.num_shards == 1:
            return slots
        rows = self.local_rows(slots)
        return torch.where(rows < 0, len(self), rows)

    def _put(self, rows: Tensor, vectors: Tensor, labels: Tensor) -> None:
        self._vectors[rows] = vectors
        self._labels[rows] = labels


def memory_size(config: Config, train_size: int) -> int:
    """Slots of the memory: `--memory-ratio` of the training set, rounded down."""
    return int(train_size * config.memory.memory_ratio)


def check_memory_size(config: Config, train_size: int) -> None:
    """Raises UserError for a memory that is smaller than a batch."""
    slots = memory_size(config, train_size)
    if config.memory.memory_ratio > 0 and slots < config.optim.batch_size:
        raise UserError(
            f"--batch-size {config.optim.batch_size}: larger than the memory, which holds {slots} "
            f"(--memory-ratio {config.memory.memory_ratio} of {train_size} training images): lower it, "
            "raise the ratio, or pass --memory-ratio 0"
        )


def build_memory(
    config: Config, train_size: int, dim: int, device: torch.device, ranks: Ranks, *, tf32: bool = False
) -> Optional[CrossBatchMemory]:
    """The memory that `config` describes, or this rank's shard of it; None without slots.

    tf32: as in `CrossBatchMemory`.
    """
    size = memory_size(config, train_size)
    if not size:
        return None
    dtype = torch.bfloat16 if config.memory.memory_dtype == "bf16" else torch.float32
    if not (config.memory.memory_sharded and ranks.is_distributed):
        return CrossBatchMemory(size, dim, dtype, device, tf32=tf32)
    return CrossBatchMemory(size, dim, dtype, device, shard=ranks.rank, num_shards=ranks.world_size, tf32=tf32)
