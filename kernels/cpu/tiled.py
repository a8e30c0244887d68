"""The objective in tiles: `contrastive_koleo`, and its parts for several ranks.

The gradient of each loss is known when all tiles are summed up: the forward computes it, and the
backward weights the three.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from fastirt.kernels.cpu.tiles import Nearest, PairTotals, has_padding, tiles, valid_vectors
from fastirt.kernels.reference import ContrastiveKoLeo, PairOptions, neighbor_distance


def contrastive_koleo(
    z: Tensor, labels: Tensor, memory: Optional[Tensor], memory_labels: Optional[Tensor],
    memory_self: Optional[Tensor], options: PairOptions,
) -> ContrastiveKoLeo:  # fmt: skip
    """`reference.contrastive_koleo` in tiles; each loss can be differentiated once."""
    return ContrastiveKoLeo(*_Losses.apply(z, labels, memory, memory_labels, memory_self, options))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor, memory, memory_labels, memory_self, options) -> tuple[Tensor, ...]:
        margin, reduction, koleo_eps, distance_eps, _, finite_slots = options
        # Without a compiler the operator's dispatch would be a tenth of a small batch's time.
        compute = operator if torch.compiler.is_compiling() else losses_and_gradients
        *losses, gradients = compute(
            z, labels, memory, memory_labels, memory_self, margin, reduction, koleo_eps, distance_eps, finite_slots
        )
        ctx.save_for_backward(z, gradients)
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, batch: Optional[Tensor], memory: Optional[Tensor], koleo: Optional[Tensor]) -> tuple:
        z, gradients = ctx.saved_tensors
        total = None
        for gradient, weight in zip(gradients, (batch, koleo, memory)):
            if weight is not None:
                total = gradient * weight if total is None else total.addcmul_(gradient, weight)
        if total is None:  # of the memory's loss, without a memory
            total = torch.zeros_like(gradients[0])
        total = total.to(z.dtype)
        # torch.compile refuses second derivatives itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            total = _Once.apply(z, total)
        return total, None, None, None, None, None


class _Once(torch.autograd.Function):
    """The gradient, which depends on z; a derivative would otherwise take it for a constant."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("contrastive_koleo: the tiled version has no second derivative: use impl='reference'")


def losses_and_gradients(
    z: Tensor,
    labels: Tensor,
    memory: Optional[Tensor],
    memory_labels: Optional[Tensor],
    memory_self: Optional[Tensor],
    margin: float,
    reduction: str,
    koleo_eps: float,
    distance_eps: float,
    finite_slots: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(batch, memory, koleo, gradients (2 or 3, N, D) float32: of batch, KoLeo and a memory)."""
    options = PairOptions(margin, reduction, koleo_eps, distance_eps)
    padding = has_padding(labels)
    count = int(torch.count_nonzero(labels >= 0)) if padding else len(labels)
    rows = valid_vectors(z, labels, padding)
    gradients = rows.new_empty(2 if memory is None else 3, *rows.shape)
    totals, nearest = PairTotals(labels, labels, 0, options, padding), Nearest(len(z), labels, 0, padding)
    for tile in tiles(rows, rows, labels, masked=False):
        totals.add(tile)
        nearest.add(tile)
    batch = _loss(totals, count, gradients[0], 2)  # each pair of the batch stands in two rows
    if count > 1:
        koleo = _koleo(rows, nearest.index(labels) if padding else nearest.column, count, options, gradients[1])
        if math.isnan(totals.sums[0]):
            koleo.fill_(math.nan)
    else:
        koleo = rows.new_full((), totals.sums[0] * 0, dtype=torch.float32)
        gradients[1].zero_()
    if memory is None:
        return batch, rows.new_zeros((), dtype=torch.float32), koleo, gradients
    empty = has_padding(memory_labels)
    totals = PairTotals(labels, memory_labels, memory_self, options, padding or empty)
    for tile in tiles(rows, memory, memory_labels, masked=empty and not finite_slots):
        totals.add(tile)
    return batch, _loss(totals, count, gradients[2], 1), koleo, gradients


def _loss(totals: PairTotals, count: int, gradient: Tensor, factor: float) -> Tensor:
    """The contrastive loss of a batch of `count` rows, 0-d; writes `factor` times its gradient."""
    pull, push = (1 / max(1, n if totals.options.nonzero else count) for n in totals.counts)
    positive, negative = totals.columns
    if positive is None:
        gradient.zero_()
    else:
        torch.mul(positive, -factor * pull, out=gradient)
    if negative is not None:
        gradient.add_(negative, alpha=factor * push)
    return gradient.new_full((), totals.sums[0] * pull + totals.sums[1] * push)


def _koleo(rows: Tensor, index: Tensor, count: int, options: PairOptions, gradient: Tensor) -> Tensor:
    """KoLeo of a batch of `count` rows, 0-d; writes its gradient.

    index: (N,) int64, of the nearest row; -1 for padding.
    """
    nearest = index.clamp(min=0) if count < len(rows) else index
    torch.sub(rows, rows.index_select(0, nearest), out=gradient).add_(options.distance_eps)
    rho = torch.linalg.vector_norm(gradient, dim=1)
    apart = rho + options.koleo_eps
    # A distance of 0 has no direction: 0 divided by a number.
    scale, logarithms = rho.clamp_(min=1e-20).mul_(apart).mul_(-count), apart.log_()
    if count < len(rows):
        scale, logarithms = torch.where(index >= 0, scale, math.inf), torch.where(index >= 0, logarithms, 0.0)
    gradient.div_(scale[:, None])
    gradient.index_add_(0, nearest, gradient.clone(), alpha=-1)
    return logarithms.sum() / -count


# Opaque to torch.compile, which cannot trace lists of pairs.
operator = torch.library.custom_op(
    "fastirt::contrastive_koleo_tiled", losses_and_gradients, mutates_args=(), device_types="cpu"
)


@operator.register_fake
def _(z, labels, memory, *_):
    losses = [z.new_empty((), dtype=torch.float32) for _ in range(3)]
    return *losses, z.new_empty((2 if memory is None else 3, *z.shape), dtype=torch.float32)


def pair_stats(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, self_index: Optional[Tensor],
    options: PairOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.pair_stats` in tiles: (pos_sum, pos_count, neg_sum, neg_count)."""
    totals = _totals(rows, row_labels, cols, col_labels, self_index, options, gradient=False)
    sums, counts = torch.tensor(totals.sums, dtype=torch.float64), torch.tensor(totals.counts)
    return sums[0], counts[0], sums[1], counts[1]


def pair_grad(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, self_index: Optional[Tensor],
    options: PairOptions, *, scale_pos: Tensor, scale_neg: Tensor,
) -> Tensor:  # fmt: skip
    """`reference.pair_grad` in tiles."""
    totals = _totals(rows, row_labels, cols, col_labels, self_index, options, gradient=True)
    gradient = torch.zeros(rows.shape, dtype=torch.float32)
    for columns, scale in zip(totals.columns, (-scale_pos, scale_neg)):
        if columns is not None:
            gradient.addcmul_(columns, scale.detach().float())
    return gradient.to(rows.dtype)


@torch.no_grad()
def _totals(rows, row_labels, cols, col_labels, self_index, options: PairOptions, gradient: bool) -> PairTotals:
    row_padding, col_padding = has_padding(row_labels), has_padding(col_labels)
    totals = PairTotals(row_labels, col_labels, self_index, options, row_padding or col_padding, gradient)
    masked = col_padding and not options.finite_slots
    for tile in tiles(valid_vectors(rows, row_labels, row_padding), cols, col_labels, masked):
        totals.add(tile)
    return totals


def nearest(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, *, row_offset: int, distance_eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.nearest` in tiles, without gradient: (rho, index)."""
    padding = has_padding(col_labels)
    rows = valid_vectors(rows, row_labels, has_padding(row_labels))
    search = Nearest(len(rows), col_labels, row_offset, padding)
    for tile in tiles(rows, cols, col_labels, masked=padding):
        search.add(tile)
    index = search.index(row_labels) if len(cols) else torch.full((len(rows),), -1)
    return neighbor_distance(rows, cols, index, distance_eps), index
