"""Gradients summed over the ranks while the backward pass runs."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastirt.distributed.ranks import Ranks
from fastirt.model.encoder import Encoder


class GradientSync:
    """An encoder's forward; DDP sums its gradients over the ranks while the backward runs."""

    def __init__(self, encoder: Encoder, embed: Callable[[Encoder, Tensor], Tensor], ranks: Ranks) -> None:
        self.ranks, module = ranks, _EmbedModule(encoder, embed)
        self.reducer = DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )
        self.reducer.register_comm_hook(None, ranks.collectives.sum_bucket)
        self._is_stable = False

    def __call__(self, _: Encoder, images: Tensor) -> Tensor:
        if not self._is_stable:
            self._stabilize_buckets(images)
        return self.reducer(images)

    def _stabilize_buckets(self, images: Tensor) -> None:
        """Run two throw-away backward passes so that DDP finishes rebuilding its buckets.

        The layout of the buckets fixes the order in which gradients are summed: without this a
        resumed run is not bit-identical to one that never stopped.
        """
        self._is_stable, wire = True, self.ranks.collectives.bytes_moved
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            for _ in range(2):
                self.reducer(images).sum().backward()
        for weight in self.reducer.parameters():
            weight.grad = None
        self.ranks.collectives.bytes_moved = wire


class _EmbedModule(nn.Module):
    def __init__(self, encoder: Encoder, embed: Callable[[Encoder, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self._embed = encoder, embed

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(self.encoder, images)
