"""Implementations of the loss that are timed: kernels or tiles, PyTorch, torch.compile,
pytorch-metric-learning."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders.public_recipe import contrastive_loss, has_metric_learning
from fastirt.kernels import contrastive_koleo
from fastirt.kernels.checks import choose_impl
from fastirt.kernels.reference import koleo as reference_koleo

LAMBDA = 0.7


def inputs(rows: int, slots: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Optional[Tensor]]:
    """Arguments of the losses: clustered unit vectors, two rows a class.

    z (N, D), labels (N,), memory (M, D), memory_labels (M,), memory_self (N,): the slot that holds
    the row itself, -1 for none. The batch is in the first slots. With M = 0 the last three are
    None.
    """
    generator = torch.Generator(device).manual_seed(0)
    classes = max(2, max(rows, slots) // 5)
    centers = torch.randn(classes, dim, device=device, generator=generator)

    def draw(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), dim, device=device, generator=generator)
        return F.normalize(centers[labels] + noise, dim=1).to(dtype)

    labels = torch.arange(rows, device=device) // 2 % classes
    z = draw(labels)
    if slots == 0:
        return dict(z=z, labels=labels, memory=None, memory_labels=None, memory_self=None)
    memory_labels = torch.randint(classes, (slots,), device=device, generator=generator)
    memory = draw(memory_labels)
    shared = min(rows, slots)
    memory[:shared], memory_labels[:shared] = z[:shared], labels[:shared]
    row = torch.arange(rows, device=device)
    memory_self = torch.where(row < shared, row, -1)
    return dict(z=z, labels=labels, memory=memory, memory_labels=memory_labels, memory_self=memory_self)


def step(tensors: dict[str, Any], loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that computes (loss, its gradient at z) of `inputs`."""
    z = tensors["z"].detach().requires_grad_()
    others = [tensors[name] for name in ("labels", "memory", "memory_labels", "memory_self")]

    def call() -> tuple[Tensor, Tensor]:
        value = loss(z, *others)
        return value.detach(), torch.autograd.grad(value, z)[0]

    return call


def fast_impl(device: torch.device) -> str:
    """The `impl` of the contender "fastirt"."""
    return "tiled" if device.type == "cpu" else "triton"


def kernels_missing(device: torch.device, dim: int) -> str:
    """Why the fast implementation cannot run on this device at this D; empty if it can."""
    try:
        choose_impl(fast_impl(device), torch.empty(1, dim, device=device))
    except ValueError as error:
        return str(error)
    return ""


def losses(reduction: str, device: torch.device, dim: int) -> dict[str, Callable[..., Tensor]]:
    """Implementations of batch + memory + LAMBDA * koleo, by name.

    "fastirt" is included where its `fast_impl` runs; "metric-learning" where that package is
    installed, for `nonzero_mean` alone, which is its reduction. It also counts a row's pair with
    its own slot, so its value differs when the batch is in the memory.
    """

    def ours(impl: str) -> Callable[..., Tensor]:
        def loss(z, labels, memory, memory_labels, memory_self):
            terms = contrastive_koleo(
                z, labels, memory, memory_labels, memory_self=memory_self, reduction=reduction, impl=impl,
                finite_slots=True,
            )  # fmt: skip
            return terms.batch + terms.memory + LAMBDA * terms.koleo

        return loss

    implementations = {"plain": ours("reference"), "compiled": torch.compile(ours("reference"), dynamic=False)}
    if not kernels_missing(device, dim):
        implementations = {"fastirt": ours(fast_impl(device)), **implementations}
    if reduction == "nonzero_mean" and has_metric_learning():
        contrastive = contrastive_loss(0.5)

        def metric_learning(z, labels, memory, memory_labels, memory_self):
            value = contrastive(z, labels) + LAMBDA * reference_koleo(z)
            return value if memory is None else value + contrastive(z, labels, ref_emb=memory, ref_labels=memory_labels)

        implementations["metric-learning"] = metric_learning
    return implementations
