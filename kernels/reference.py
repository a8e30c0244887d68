"""Plain PyTorch reference of the objective: it states what every faster implementation computes.

With s_ij the inner product of row i and column j, both of unit length, and margin β:

    contrastive = 1/N Σ_i ( Σ_{j: y_j = y_i} (1 - s_ij)  +  Σ_{j: y_j ≠ y_i} max(0, s_ij - β) )
    koleo       = -1/N Σ_i log ρ_i,   ρ_i = min_{j ≠ i} ‖z_i - z_j‖

    loss = contrastive(batch, batch) + contrastive(batch, memory) + λ koleo(batch)

These are equations 1 and 2 of El-Nouby et al. 2021 (arXiv 2102.05644), here `anchor_sum`.
`nonzero_mean` instead divides each of the two sums by the number of its non-zero terms, as
pytorch-metric-learning's ContrastiveLoss with its default reducer does.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

REDUCTIONS = ("anchor_sum", "nonzero_mean")
# `nonzero_mean` counts the pairs whose loss exceeds this: at 0, rounding at s = 1 would decide.
PAIR_THRESHOLD = 1e-6
KOLEO_EPS = 1e-8
KOLEO_DISTANCE_EPS = 1e-6


class PairOptions(NamedTuple):
    """The scalars of the objective, in the order in which the torch operators take them."""

    margin: float = 0.5  # cosine similarity above which a negative pair costs
    reduction: str = "anchor_sum"  # one of REDUCTIONS
    koleo_eps: float = KOLEO_EPS  # inside KoLeo's logarithm
    distance_eps: float = KOLEO_DISTANCE_EPS  # inside the norm, on each component
    precision: str = "auto"  # of the kernels' matrix products; the reference takes float32
    finite_slots: bool = False  # whether columns with a negative label are finite; for the kernels

    @property
    def nonzero(self) -> bool:
        return self.reduction == "nonzero_mean"


class ContrastiveKoLeo(NamedTuple):
    """The three losses, 0-d float32, unweighted: batch with batch, batch with memory, KoLeo."""

    batch: Tensor
    memory: Tensor
    koleo: Tensor


def pair_loss(
    rows: Tensor,
    row_labels: Tensor,
    cols: Tensor,
    col_labels: Tensor,
    *,
    self_index: Optional[Tensor] = None,
    margin: float = 0.5,
    reduction: str = "anchor_sum",
) -> Tensor:
    """Contrastive loss of every row against every column, a 0-d float32 tensor.

    rows: (N, D), L2-normalized, any float dtype; computed in float32.
    row_labels: (N,) integers; negative = padding, whose row may hold anything, even NaN.
    cols: (M, D), like rows.
    col_labels: (M,) integers; negative = empty slot, whose column may hold anything.
    self_index: (N,) int64, the column that is the row itself and so no pair; -1 for none.
    margin, reduction: see `PairOptions`.

    A non-finite value in any other row or column makes the loss NaN.
    Raises ValueError for an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    row_valid = row_labels >= 0
    options = PairOptions(margin, reduction)
    similarity, positive, negative = _pairs(rows, row_labels, cols, col_labels, self_index, options)
    pull, push = 1 - similarity, similarity - margin
    if reduction == "anchor_sum":
        total = torch.where(positive, pull, 0.0).sum() + torch.where(negative, push, 0.0).sum()
        loss = total / row_valid.sum().clamp(min=1)
    else:
        loss = _mean_where(pull, positive) + _mean_where(push, negative)
    return loss + similarity.detach().mul(0).sum()  # 0, or NaN where any similarity is not finite


def _pairs(rows, row_labels, cols, col_labels, self_index, options: PairOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(similarity, positive, negative), each (N, M): float32 products, and the pairs that cost."""
    row_valid, col_valid = row_labels >= 0, col_labels >= 0
    rows = torch.where(row_valid[:, None], rows.float(), 0.0)
    cols = torch.where(col_valid[:, None], cols.float(), 0.0)
    with torch.autocast(rows.device.type, enabled=False):
        similarity = rows @ cols.T
    pair = row_valid[:, None] & col_valid[None, :]
    if self_index is not None:
        pair = pair & (torch.arange(cols.shape[0], device=cols.device)[None, :] != self_index[:, None])
    same = row_labels[:, None] == col_labels[None, :]
    if options.reduction == "anchor_sum":
        return similarity, pair & same, pair & ~same & (similarity > options.margin)
    costly_pull, costly_push = 1 - similarity > PAIR_THRESHOLD, similarity - options.margin > PAIR_THRESHOLD
    return similarity, pair & same & costly_pull, pair & ~same & costly_push


def pair_stats(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, self_index: Optional[Tensor],
    options: PairOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Twin of `fastirt.kernels.pair_stats`: (pos_sum, pos_count, neg_sum, neg_count)."""
    with torch.no_grad():
        similarity, positive, negative = _pairs(rows, row_labels, cols, col_labels, self_index, options)
        nan_flag = similarity.mul(0).sum().double()
        pos_sum = torch.where(positive, 1 - similarity, 0.0).sum(dtype=torch.float64) + nan_flag
        neg_sum = torch.where(negative, similarity - options.margin, 0.0).sum(dtype=torch.float64)
        return pos_sum, positive.sum(), neg_sum, negative.sum()


def pair_grad(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, self_index: Optional[Tensor],
    options: PairOptions, *, scale_pos: Tensor, scale_neg: Tensor,
) -> Tensor:  # fmt: skip
    """Twin of `fastirt.kernels.pair_grad`."""
    with torch.no_grad():
        _, positive, negative = _pairs(rows, row_labels, cols, col_labels, self_index, options)
        weight = torch.where(negative, scale_neg.float(), torch.where(positive, -scale_pos.float(), 0.0))
        return (weight @ torch.where((col_labels >= 0)[:, None], cols.float(), 0.0)).to(rows.dtype)


def nearest_column(rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, row_offset: int = 0) -> Tensor:
    """(N,) int64: the column of highest inner product, except the row itself, row + row_offset.

    Of equal columns the lowest index. Columns with a negative label are not candidates.
    -1 for padding and for a row without a candidate. No gradient.
    """
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        similarity = rows.float() @ cols.float().T
        self_index = torch.arange(rows.shape[0], device=rows.device) + row_offset
        columns = torch.arange(cols.shape[0], device=rows.device)
        candidate = (col_labels >= 0)[None, :] & (columns != self_index[:, None])
        similarity = torch.where(candidate, similarity, float("-inf"))  # an opposite vector has -1
        if cols.shape[0] == 0:
            return torch.full_like(self_index, -1)
        return torch.where(candidate.any(dim=1) & (row_labels >= 0), similarity.argmax(dim=1), -1)


def nearest(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, *, row_offset: int, distance_eps: float
) -> tuple[Tensor, Tensor]:
    """Twin of `fastirt.kernels.nearest`: (rho, index); rho has a gradient in rows and cols."""
    index = nearest_column(rows, row_labels, cols, col_labels, row_offset)
    rows = torch.where((row_labels >= 0)[:, None], rows.float(), 0.0)
    return neighbor_distance(rows, cols, index, distance_eps), index


def neighbor_distance(rows: Tensor, cols: Tensor, index: Tensor, distance_eps: float) -> Tensor:
    """(N,) float32: ||row - column + distance_eps||, 0 where there is no column; NaN where the row
    is not finite.

    rows: (N, D) float32, zeros where they are padding.
    cols: (C, D). index: (N,) int64, the column, -1 for none.
    """
    if cols.shape[0] == 0:
        return rows.sum(dim=1) * 0
    neighbors = torch.where((index >= 0)[:, None], cols.float()[index.clamp(min=0)], 0.0)
    rho = torch.linalg.vector_norm(rows - neighbors + distance_eps, dim=1)
    return torch.where(index >= 0, rho, 0.0) + rows.detach().mul(0).sum(dim=1)


def koleo(
    z: Tensor, labels: Optional[Tensor] = None, *, eps: float = KOLEO_EPS, distance_eps: float = KOLEO_DISTANCE_EPS
) -> Tensor:
    """-1/N sum_i log(rho_i + eps) with rho_i = ||z_i - z_k + distance_eps||, k nearest to i.

    z: (N, D), L2-normalized, any float dtype.
    labels: (N,) integers; rows with a negative label (padding) take no part. None: all rows do.
    eps, distance_eps: see `PairOptions`.

    Returns a 0-d float32 tensor, 0 for fewer than two rows. The distance comes from the float32
    difference of the vectors, never from sqrt(2 - 2s); the gradient flows to both ends.
    """
    labels = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device) if labels is None else labels
    rho, index = nearest(z, labels, z, labels, row_offset=0, distance_eps=distance_eps)
    terms = torch.where(index >= 0, -torch.log(rho + eps), rho.detach() * 0)
    return terms.sum() / (labels >= 0).sum().clamp(min=1)


def koleo_grad(
    rows: Tensor, cols: Tensor, rho: Tensor, index: Tensor, *, row_offset: int, scale: Tensor, koleo_eps: float,
    distance_eps: float,
) -> Tensor:  # fmt: skip
    """Twin of `fastirt.kernels.koleo_grad`."""
    with torch.no_grad():
        vectors = cols.float()
        pull = torch.where((index >= 0) & (rho > 0), -scale / ((rho + koleo_eps) * rho), 0.0)
        ends = pull[:, None] * (vectors - vectors[index.clamp(min=0)] + distance_eps)
        ends = torch.where((index >= 0)[:, None], ends, 0.0)
        gradient = ends.index_add(0, index.clamp(min=0), -ends)
        return gradient[row_offset : row_offset + rows.shape[0]].to(rows.dtype)


def contrastive_koleo(
    z: Tensor, labels: Tensor, memory: Optional[Tensor], memory_labels: Optional[Tensor],
    memory_self: Optional[Tensor], options: PairOptions,
) -> ContrastiveKoLeo:  # fmt: skip
    """Twin of `fastirt.kernels.contrastive_koleo`: the three losses. The memory has no gradient."""
    pairs = dict(margin=options.margin, reduction=options.reduction)
    self_index = torch.arange(z.shape[0], device=z.device)
    batch_loss = pair_loss(z, labels, z, labels, self_index=self_index, **pairs)
    memory_loss = torch.zeros((), device=z.device)
    if memory is not None:
        memory_loss = pair_loss(z, labels, memory.detach(), memory_labels, self_index=memory_self, **pairs)
    koleo_loss = koleo(z, labels, eps=options.koleo_eps, distance_eps=options.distance_eps)
    return ContrastiveKoLeo(batch_loss, memory_loss, koleo_loss)


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 if none is chosen."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)
