"""`contrastive_koleo`: the three losses of a batch, differentiable in its embeddings, as one torch operator."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.kernels import launch, reference
from fastirt.kernels.checks import (
    PRECISIONS,
    check_choice,
    check_integers,
    check_vectors,
    choose_impl,
    resolve_precision,
)
from fastirt.kernels.reference import KOLEO_DISTANCE_EPS, KOLEO_EPS, REDUCTIONS, ContrastiveKoLeo


def contrastive_koleo(
    z: Tensor,
    labels: Tensor,
    memory: Optional[Tensor] = None,
    memory_labels: Optional[Tensor] = None,
    *,
    memory_self: Optional[Tensor] = None,
    margin: float = 0.5,
    reduction: str = "anchor_sum",
    koleo_eps: float = KOLEO_EPS,
    koleo_distance_eps: float = KOLEO_DISTANCE_EPS,
    precision: str = "auto",
    impl: str = "auto",
    check: bool = False,
) -> ContrastiveKoLeo:
    """(batch, memory, koleo): 0-d float32 losses, unweighted, each differentiable in z; the sum is the caller's.

    z (N, D) float32, bfloat16 or float16, rows L2-normalised; its gradient has its dtype. labels (N,) int32 or int64, a
    negative one marks padding. memory (M, D), any of those dtypes, no gradient; memory_labels (M,), -1 = empty slot, whose
    row may hold anything. memory_self (N,) int64: each row's own slot in the memory, which is no pair; -1 = none. The memory must
    not change before the backward, which refuses it.

    margin: similarity from which a negative pair costs. reduction: `anchor_sum` (El-Nouby et al. 2021, equation 1) or
    `nonzero_mean` (pytorch-metric-learning's default reducer, over pairs with a loss above 1e-6). koleo_eps is inside the
    logarithm, koleo_distance_eps inside the norm. precision: of the matrix products; `auto` is that of 16-bit inputs, and what
    torch.get_float32_matmul_precision() says for float32 ones. impl: `triton`, `reference` (plain PyTorch), or by device.
    check: look at the labels' values, which waits for the device.

    No pair: that loss is 0 with zero gradient. NaN or infinity in z or in a filled slot: NaN. Fewer than two rows: koleo is 0.
    Raises ValueError for wrong shapes, dtypes, devices or words; RuntimeError for a second derivative of the Triton version.
    """
    check_vectors("z", z)
    check_integers("labels", labels, z)
    check_choice("reduction", reduction, REDUCTIONS)
    if not -1e6 < margin < 1e6:  # NaN too; math.isfinite would break a compiled graph
        raise ValueError(f"margin: needs a finite number, got {margin}")
    if (memory is None) != (memory_labels is None):
        raise ValueError("memory and memory_labels: give both or neither")
    if memory is not None:
        check_vectors("memory", memory, z)
        check_integers("memory_labels", memory_labels, memory)
    if memory_self is not None:
        if memory is None:
            raise ValueError("memory_self: there is no memory")
        check_integers("memory_self", memory_self, z, (torch.int64,))
    if check:
        _check_values(memory, memory_labels, memory_self)
    check_choice("precision", precision, PRECISIONS)
    if choose_impl(impl, z) == "reference":
        return reference.contrastive_koleo(
            z, labels, memory, memory_labels, memory_self=memory_self, margin=margin, reduction=reduction,
            koleo_eps=koleo_eps, koleo_distance_eps=koleo_distance_eps,
        )  # fmt: skip
    memory = None if memory is None else memory.detach()
    batch, against_memory, koleo, *_ = _forward(
        z, labels, memory, memory_labels, memory_self, margin, reduction, koleo_eps, koleo_distance_eps, precision
    )
    return ContrastiveKoLeo(batch, against_memory, koleo)


def _check_values(memory: Optional[Tensor], memory_labels: Optional[Tensor], memory_self: Optional[Tensor]) -> None:
    """Raises ValueError for values that cannot be meant. Waits for the device."""
    if memory_labels is not None and bool((memory_labels < -1).any()):
        raise ValueError("memory_labels: an empty slot is -1, found a smaller value")
    if memory_self is not None:
        if bool(((memory_self < -1) | (memory_self >= memory.shape[0])).any()):
            raise ValueError(f"memory_self: needs slots of 0 to {memory.shape[0] - 1}, or -1 for none")
        used = memory_self[memory_self >= 0]
        if used.unique().numel() != used.numel():
            raise ValueError("memory_self: two rows have the same slot")


def _columns(z: Tensor, labels: Tensor, memory, memory_labels, memory_self):
    """The rows, their labels, and both sets of columns, with a unit stride along D."""
    z, labels = launch.dense(z), labels.contiguous()
    batch = launch.Columns(z, labels)
    if memory is None:
        return z, labels, batch, None
    return z, labels, batch, launch.columns(memory, memory_labels, memory_self)


@torch.library.custom_op("fastirt::contrastive_koleo", mutates_args=())
def _forward(
    z: Tensor,
    labels: Tensor,
    memory: Optional[Tensor],
    memory_labels: Optional[Tensor],
    memory_self: Optional[Tensor],
    margin: float,
    reduction: str,
    koleo_eps: float,
    distance_eps: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(batch, memory, koleo, scales, rho, index); the last three are for the backward."""
    z, labels, batch, against = _columns(z, labels, memory, memory_labels, memory_self)
    found = launch.forward(
        z, labels, batch, against, margin=margin, nonzero=reduction == "nonzero_mean", koleo_eps=koleo_eps,
        distance_eps=distance_eps, precision=resolve_precision(precision, z, memory),
    )  # fmt: skip
    return tuple(found[:6])


@_forward.register_fake
def _(z, labels, memory, memory_labels, memory_self, margin, reduction, koleo_eps, distance_eps, precision):
    losses = [z.new_empty((), dtype=torch.float32) for _ in range(3)]
    rows = z.shape[0]
    return (
        *losses, z.new_empty(5, dtype=torch.float32), z.new_empty(rows, dtype=torch.float32),
        z.new_empty(rows, dtype=torch.int64),
    )  # fmt: skip


@torch.library.custom_op("fastirt::contrastive_koleo_backward", mutates_args=())
def _backward(
    grad_batch: Tensor,
    grad_memory: Tensor,
    grad_koleo: Tensor,
    z: Tensor,
    labels: Tensor,
    memory: Optional[Tensor],
    memory_labels: Optional[Tensor],
    memory_self: Optional[Tensor],
    scales: Tensor,
    rho: Tensor,
    index: Tensor,
    margin: float,
    reduction: str,
    koleo_eps: float,
    distance_eps: float,
    precision: str,
) -> Tensor:
    z, labels, batch, against = _columns(z, labels, memory, memory_labels, memory_self)
    return launch.backward(
        z, labels, batch, against, scales=scales, grads=(grad_batch, grad_memory, grad_koleo), rho=rho, index=index,
        margin=margin, nonzero=reduction == "nonzero_mean", koleo_eps=koleo_eps, distance_eps=distance_eps,
        precision=resolve_precision(precision, z, memory),
    )  # fmt: skip


@_backward.register_fake
def _(grad_batch, grad_memory, grad_koleo, z, *_):
    return z.new_empty(z.shape)


def _save(ctx, inputs, output) -> None:
    z, labels, memory, memory_labels, memory_self, *ctx.options = inputs
    ctx.save_for_backward(z, labels, memory, memory_labels, memory_self, *output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_batch, grad_memory, grad_koleo, *_):
    saved = ctx.saved_tensors
    zero = None
    grads = []
    for grad in (grad_batch, grad_memory, grad_koleo):
        if grad is None:
            zero = saved[0].new_zeros((), dtype=torch.float32) if zero is None else zero
            grad = zero
        grads.append(grad)
    gradient = _backward(*grads, *saved, *ctx.options)
    return (gradient, *[None] * 9)


def _refuse(ctx, *_):
    raise RuntimeError("contrastive_koleo: the Triton version has no second derivative: use impl='reference'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)
