"""The order of collectives: `python -m tests.fake_cuda.run collectives_proof [CASE ...]`.

Each rank of a job runs its steps on fake CUDA tensors, one rank after the other, in a process group
that moves nothing. All ranks must call the same collectives with the same shapes in the same order,
or NCCL would wait forever.
"""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastirt.distributed.collectives import Collectives
from fastirt.distributed.ranks import Ranks
from fastirt.images import normalize
from fastirt.step import gradient_sync
from tests.fake_cuda.cases import print_faults
from tests.fake_cuda.step_proof import BATCH, batch_of, fake_step, run_steps

NAMES = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_to_all", "broadcast", "barrier")
TWIN, SHARDED = dict(encoder_momentum=0.999), dict(memory_sharded=True)

# name: (ranks, settings, settings of the last rank that differ)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "2 ranks": (2, dict(engine="eager"), {}),
    "2 ranks, momentum encoder, sharded": (2, dict(engine="eager", **TWIN, **SHARDED), {}),
    "2 ranks, graph": (2, dict(engine="graph", precision="bf16-weights", **SHARDED), {}),
    "8 ranks, sharded": (8, dict(engine="eager", contrastive="nonzero_mean", **SHARDED), {}),
    "8 ranks, momentum encoder": (8, dict(engine="eager", **TWIN), {}),
    "planted: one rank has no momentum encoder": (2, dict(engine="eager", **TWIN), dict(encoder_momentum=None)),
}


class GradientBuckets(nn.Module):
    """Stands in for DistributedDataParallel, whose C++ part asks the driver for events.

    The last gradient of a backward sends all of them, in two buckets, through the communication
    hook. As with DDP the gradients become views of the buckets.
    """

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module, self.weights = module, [p for p in module.parameters() if p.requires_grad]
        self.arrived = 0
        for weight in self.weights:
            weight.register_post_accumulate_grad_hook(self._count)

    def register_comm_hook(self, state: Any, hook: Callable) -> None:
        self.hook = hook

    def forward(self, images: Tensor) -> Tensor:
        self.arrived = 0
        return self.module(images)

    def _count(self, weight: Tensor) -> None:
        self.arrived += 1
        if self.arrived == len(self.weights):
            half = len(self.weights) // 2
            for weights in (self.weights[half:], self.weights[:half]):
                buffer = torch.cat([w.grad.reshape(-1) for w in weights])
                self.hook(None, SimpleNamespace(buffer=lambda buffer=buffer: buffer))


def _recorded(told: list[Any], name: str, function: Callable) -> Callable:
    def call(*args: Any, **options: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        told.append([name, [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors]])
        return function(*args, **options)

    return call


def collectives(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """What one rank calls in its steps, and what is wrong with them."""
    normalize.byte_table.cache_clear(), normalize.whole_views.cache_clear()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    ranks, told = Ranks(rank, world_size, rank, world_size), []
    ranks.collectives = Collectives(rank, world_size, "nccl", dist.group.WORLD)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(mock.patch.object(gradient_sync, "DistributedDataParallel", GradientBuckets))
            for name in NAMES:
                stack.enter_context(mock.patch.object(dist, name, _recorded(told, name, getattr(dist, name))))
            step = fake_step(ranks, **{"precision": "bf16", **settings})
            return told, run_steps(step, batch_of)
    finally:
        dist.destroy_process_group()


def prove(world_size: int, settings: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """What is wrong, first of all the first collective that two ranks do not share."""
    faults, first = [], None
    for rank in range(world_size):
        told, own = collectives(rank, world_size, {**settings, **(last if rank == world_size - 1 else {})})
        faults += [f"rank {rank}: {fault}" for fault in own]
        first = first or told
        if told != first:
            differs = next((i for i, (a, b) in enumerate(zip(told, first)) if a != b), min(len(told), len(first)))
            here, there = ((each + [None])[differs] for each in (told, first))
            faults.insert(0, f"collective {differs} is {here} on rank {rank} and {there} on rank 0")
    gathered = [f"({world_size * BATCH}, " in call[1][0] for call in first if call[0] == "all_gather_into_tensor"]
    if not any(gathered) or not any(call[0] == "all_reduce" for call in first):
        faults.append(f"embeddings or gradients are not exchanged: {first}")
    if settings.get("memory_sharded") and not any(call[0] == "reduce_scatter_tensor" for call in first):
        faults.append("a sharded memory's gradients are not exchanged")
    return faults


def main(names: list[str]) -> None:
    print_faults({name: partial(prove, *case) for name, case in CASES.items()}, names)
