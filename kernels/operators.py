"""The torch operators under the public functions: scalars in the schemas, `PairOptions` inside.

`contrastive_koleo` is differentiable in its rows; the other operators have no gradient. All expect
arguments that the public functions have checked: a resolved precision, and the vectors' products as
`rounding.product_operand` gives them.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.kernels.passes import launch
from fastirt.kernels.reference import PairOptions


def _columns(z: Tensor, products: Tensor, labels: Tensor, memory, memory_labels, memory_self):
    """The rows, their labels, and both sets of columns, with stride 1 along D."""
    z, labels = launch.dense(z), labels.contiguous()
    batch = launch.Columns(z, labels, products=launch.dense(products))
    if memory is None:
        return z, labels, batch, None
    return z, labels, batch, launch.columns(memory, memory_labels, memory_self)


@torch.library.custom_op("fastirt::contrastive_koleo", mutates_args=())
def contrastive_koleo(
    z: Tensor,
    products: Tensor,
    labels: Tensor,
    memory: Optional[Tensor],
    memory_labels: Optional[Tensor],
    memory_self: Optional[Tensor],
    margin: float,
    reduction: str,
    koleo_eps: float,
    distance_eps: float,
    precision: str,
    finite_slots: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(batch, memory, koleo, scales, rho, index); the last three are for the backward."""
    options = PairOptions(margin, reduction, koleo_eps, distance_eps, precision, finite_slots)
    rows, labels, batch, columns = _columns(z, products, labels, memory, memory_labels, memory_self)
    result = launch.forward(rows, labels, batch, columns, options, products=batch.products)
    return tuple(result[:6])


@contrastive_koleo.register_fake
def _(z, *_):
    losses = [z.new_empty((), dtype=torch.float32) for _ in range(3)]
    rows = z.shape[0]
    scales, rho = (z.new_empty(size, dtype=torch.float32) for size in (5, rows))
    return *losses, scales, rho, z.new_empty(rows, dtype=torch.int64)


@torch.library.custom_op("fastirt::contrastive_koleo_backward", mutates_args=())
def contrastive_koleo_backward(
    grad_batch: Tensor,
    grad_memory: Tensor,
    grad_koleo: Tensor,
    z: Tensor,
    products: Tensor,
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
    finite_slots: bool,
) -> Tensor:
    """(N, D) in the dtype of z: the gradient of the losses, each times its 0-d float32 grad_*."""
    options = PairOptions(margin, reduction, koleo_eps, distance_eps, precision, finite_slots)
    rows, labels, batch, columns = _columns(z, products, labels, memory, memory_labels, memory_self)
    return launch.backward(
        rows, labels, batch, columns, options, scales=scales, grads=(grad_batch, grad_memory, grad_koleo),
        rho=rho, index=index, products=batch.products,
    )  # fmt: skip


@contrastive_koleo_backward.register_fake
def _(grad_batch, grad_memory, grad_koleo, z, *_):
    return z.new_empty(z.shape)


def _save(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output[3:])
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
    gradient = contrastive_koleo_backward(*grads, *saved, *ctx.options)
    return (gradient, *[None] * 11)


def _refuse(ctx, *_):
    raise RuntimeError("contrastive_koleo: the Triton version has no second derivative: use impl='reference'")


contrastive_koleo.register_autograd(_differentiate, setup_context=_save)
contrastive_koleo_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


@torch.library.custom_op("fastirt::pair_stats", mutates_args=())
def pair_stats(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, self_index: Optional[Tensor], margin: float,
    reduction: str, precision: str, finite_slots: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """((pos_sum, neg_sum) float64, (pos_count, neg_count) int64); rows: their products only."""
    options = PairOptions(margin, reduction, precision=precision, finite_slots=finite_slots)
    memory = launch.columns(cols, col_labels, self_index)
    result = launch.forward(launch.dense(rows), row_labels.contiguous(), None, memory, options)
    return result.sums[2:4].clone(), result.counts[2:4].clone()


@pair_stats.register_fake
def _(rows, *_):
    return rows.new_empty(2, dtype=torch.float64), rows.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("fastirt::pair_grad", mutates_args=())
def pair_grad(
    rows: Tensor, products: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor,
    self_index: Optional[Tensor], scales: Tensor, margin: float, reduction: str, precision: str, finite_slots: bool,
) -> Tensor:  # fmt: skip
    """(N, D) in the rows' dtype; scales (2,) float32: weights of positive and negative pairs."""
    options = PairOptions(margin, reduction, precision=precision, finite_slots=finite_slots)
    one = scales.new_ones(())
    return launch.backward(
        launch.dense(rows), row_labels.contiguous(), None, launch.columns(cols, col_labels, self_index), options,
        scales=torch.cat([scales, scales]), grads=(one, one, one), rho=one, index=row_labels,
        products=launch.dense(products), koleo=False,
    )  # fmt: skip


@pair_grad.register_fake
def _(rows, *_):
    return rows.new_empty(rows.shape)


@torch.library.custom_op("fastirt::nearest", mutates_args=())
def nearest(
    rows: Tensor, products: Tensor, row_labels: Tensor, cols: Tensor, col_products: Tensor, col_labels: Tensor,
    row_offset: int, distance_eps: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rho (N,) float32, index (N,) int64)."""
    options = PairOptions(distance_eps=distance_eps, precision=precision)
    batch = launch.columns(cols, col_labels, row_offset=row_offset)._replace(products=launch.dense(col_products))
    result = launch.forward(
        launch.dense(rows), row_labels.contiguous(), batch, None, options, products=launch.dense(products), pairs=False
    )
    return result.rho, result.index


@nearest.register_fake
def _(rows, *_):
    return rows.new_empty(rows.shape[0], dtype=torch.float32), rows.new_empty(rows.shape[0], dtype=torch.int64)


@torch.library.custom_op("fastirt::koleo_grad", mutates_args=())
def koleo_grad(
    rows: Tensor, cols: Tensor, rho: Tensor, index: Tensor, scale: Tensor, row_offset: int, koleo_eps: float,
    distance_eps: float,
) -> Tensor:  # fmt: skip
    """(N, D) in the rows' dtype; scale: 0-d float32."""
    options = PairOptions(koleo_eps=koleo_eps, distance_eps=distance_eps, precision="fp32")
    return launch.backward(
        launch.dense(rows), index, launch.columns(cols, index, row_offset=row_offset), None, options,
        scales=scale.new_ones(5), grads=(scale, scale, scale), rho=rho.contiguous(), index=index.contiguous(),
        pairs=False,
    )  # fmt: skip


@koleo_grad.register_fake
def _(rows, *_):
    return rows.new_empty(rows.shape)
