"""Every way to compute the loss that is timed: the kernels, plain PyTorch, torch.compile, pytorch-metric-learning."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders.public_recipe import contrastive_loss, has_metric_learning
from fastirt.kernels import contrastive_koleo
from fastirt.kernels.checks import choose_impl
from fastirt.kernels.reference import koleo as plain_koleo
from fastirt.step import engine

LAMBDA = 0.7


def inputs(rows: int, slots: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Optional[Tensor]]:
    """Clustered unit vectors, two rows a class; the batch stands in the first slots."""
    generator = torch.Generator(device).manual_seed(0)
    classes = max(2, max(rows, slots) // 5)
    centres = torch.randn(classes, dim, device=device, generator=generator)

    def draw(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), dim, device=device, generator=generator)
        return F.normalize(centres[labels] + noise, dim=1).to(dtype)

    labels = torch.arange(rows, device=device) // 2 % classes
    z = draw(labels)
    if slots == 0:
        return dict(z=z, labels=labels, memory=None, memory_labels=None, memory_self=None)
    memory_labels = torch.randint(classes, (slots,), device=device, generator=generator)
    memory = draw(memory_labels)
    shared = min(rows, slots)
    memory[:shared], memory_labels[:shared] = z[:shared], labels[:shared]
    own = torch.where(torch.arange(rows, device=device) < shared, torch.arange(rows, device=device), -1)
    return dict(z=z, labels=labels, memory=memory, memory_labels=memory_labels, memory_self=own)


def step(given: dict[str, Any], loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that computes (loss, its gradient at z)."""
    z = given["z"].detach().requires_grad_()
    others = [given[name] for name in ("labels", "memory", "memory_labels", "memory_self")]

    def call() -> tuple[Tensor, Tensor]:
        value = loss(z, *others)
        return value.detach(), torch.autograd.grad(value, z)[0]

    return call


def kernels_missing(device: torch.device, dim: int) -> str:
    """Why the kernels cannot run on this device at this D; empty where they can."""
    try:
        choose_impl("triton", torch.empty(1, dim, device=device))
    except ValueError as error:
        return str(error)
    return ""


def losses(reduction: str, device: torch.device, dim: int) -> dict[str, Callable[..., Tensor]]:
    """Every way to compute batch + memory + LAMBDA * koleo, by name, "fastirt" only where the kernels run. pytorch-metric-learning
    is there, if installed, for its own reduction only; it has no own-slot rule, so its value differs where the batch stands in
    the memory."""

    def ours(impl: str) -> Callable[..., Tensor]:
        def loss(z, labels, memory, memory_labels, own):
            parts = contrastive_koleo(z, labels, memory, memory_labels, memory_self=own, reduction=reduction, impl=impl)
            return parts.batch + parts.memory + LAMBDA * parts.koleo

        return loss

    found = {"plain": ours("reference"), "compiled": torch.compile(ours("reference"), dynamic=False)}
    if not kernels_missing(device, dim):
        found = {"fastirt": ours("triton"), **found}
    if reduction == "nonzero_mean" and has_metric_learning():
        contrastive = contrastive_loss(0.5)

        def metric_learning(z, labels, memory, memory_labels, own):
            value = contrastive(z, labels) + LAMBDA * plain_koleo(z)
            return value if memory is None else value + contrastive(z, labels, ref_emb=memory, ref_labels=memory_labels)

        found["metric-learning"] = metric_learning
    return found


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call as one CUDA graph, with the same results, in tensors that the next call overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    results: list[Any] = []
    graph = engine.captured(lambda: results.append(call()), torch.device("cuda", torch.cuda.current_device()))

    def replay() -> Any:
        graph.replay()
        return results[0]

    return replay
