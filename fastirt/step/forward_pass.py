"""From images to losses: forward, memory write and objective, on one rank and on many."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fastirt.distributed.ranks import Ranks
from fastirt.objective.cross_batch_memory import CrossBatchMemory, Replaced
from fastirt.objective.global_loss import GlobalLoss, MemoryShard
from fastirt.objective.own_loss import OwnGlobalLoss, OwnLoss
from fastirt.objective.retrieval_loss import Losses, RetrievalLoss
from fastirt.step.engine import Engine
from fastirt.step.gradient_sync import GradientSync
from fastirt.step.networks import Networks


class Embedded(NamedTuple):
    """What the objective compares: of n images on this rank, N on all."""

    embeddings: Tensor  # (n, D) of this rank, with gradient
    whole: Tensor  # (N, D) of all ranks, without gradient; the embeddings themselves on one rank
    labels: Tensor  # (N,) int64
    memory: Optional[MemoryShard]
    replaced: Optional[Replaced]  # the memory entries that this step overwrote


class ForwardPass:
    """Forward, memory write and objective where this process is the only rank.

    `memory` is None without one; `with_memory` says whether this step uses it.
    """

    def __init__(
        self,
        networks: Networks,
        objective: RetrievalLoss | OwnLoss,
        memory: Optional[CrossBatchMemory],
        engine: Engine,
    ) -> None:
        self.networks, self.objective, self.memory = networks, objective, memory
        self.with_memory = False
        self._embed, self._embed_keys = engine.optimized(networks.embed), engine.optimized(networks.embed)
        # A user's loss stays eager: torch.compile may not take it.
        is_own = isinstance(objective, OwnLoss)
        self._compare = objective.forward if is_own else engine.optimized(objective.forward)

    def embed(self, images: Tensor, labels: Tensor) -> Embedded:
        """images (n, 3, S, S), labels (n,) int64. Also writes the memory."""
        embeddings = self._embed(self.networks.compute_encoder, images)
        replaced, shard = None, None
        if self.with_memory:
            replaced = self.memory.enqueue(self._keys(embeddings, images), labels)
            # The momentum encoder's view of an image is a positive like any other; without one it
            # is the anchor itself.
            own_slots = replaced.slots if self.networks.compute_momentum_encoder is None else None
            shard = MemoryShard(self.memory.embeddings, self.memory.labels, own_slots, False)
        return Embedded(embeddings, embeddings, labels, shard, replaced)

    def losses(self, embedded: Embedded) -> Losses:
        """0-d float32 losses of the batch."""
        memory = () if embedded.memory is None else embedded.memory[:3]
        return self._compare(embedded.embeddings, embedded.labels, *memory)

    def _keys(self, embeddings: Tensor, images: Tensor) -> Tensor:
        """What the memory stores: the momentum encoder's embeddings, or else the encoder's."""
        if self.networks.compute_momentum_encoder is None:
            return embeddings.detach()
        with torch.no_grad():
            return self._embed_keys(self.networks.compute_momentum_encoder, images)


class DistributedForwardPass(ForwardPass):
    """The same over the batch of all ranks.

    Labels travel during the forward, embeddings during the momentum encoder's.
    """

    def __init__(
        self,
        networks: Networks,
        objective: RetrievalLoss | OwnLoss,
        memory: Optional[CrossBatchMemory],
        engine: Engine,
        ranks: Ranks,
        sharded: bool,
    ) -> None:
        super().__init__(networks, objective, memory, engine)
        self.ranks, self.sharded = ranks, sharded
        self._global_loss: GlobalLoss | OwnGlobalLoss = (
            OwnGlobalLoss(objective, ranks) if isinstance(objective, OwnLoss) else GlobalLoss(objective, ranks)
        )
        with engine.stream():
            self._embed = GradientSync(networks.compute_encoder, self._embed, ranks)

    def embed(self, images: Tensor, labels: Tensor) -> Embedded:
        pending_labels = self.ranks.collectives.gather(labels)
        embeddings = self._embed(self.networks.compute_encoder, images)
        pending = self.ranks.collectives.gather(embeddings)
        keys = None
        if self.with_memory and self.networks.compute_momentum_encoder is not None:
            keys = self.ranks.collectives.gather(self._keys(embeddings, images)).wait()
        whole, all_labels = pending.wait(), pending_labels.wait()
        replaced, shard = None, None
        if self.with_memory:
            replaced = self.memory.enqueue(whole if keys is None else keys, all_labels)
            shard = self._shard(replaced.slots)
        return Embedded(embeddings, whole, all_labels, shard, replaced)

    def _shard(self, slots: Tensor) -> MemoryShard:
        """The memory with the slots (N,) of the batch, or this rank's rows of them."""
        memory, own_slots = self.memory, None
        if self.networks.compute_momentum_encoder is None:
            first, count = self.ranks.batch_slice(len(slots))
            own_slots = slots[first : first + count]
            if self.sharded:
                own_slots = memory.local_rows(slots)
            elif isinstance(self._global_loss, OwnGlobalLoss):  # compares all rows
                own_slots = slots
        return MemoryShard(memory.embeddings, memory.labels, own_slots, self.sharded)

    def losses(self, embedded: Embedded) -> Losses:
        """0-d float32 losses of the global batch, the same bits on all ranks."""
        return self._global_loss(embedded.embeddings, embedded.whole, embedded.labels, embedded.memory)
