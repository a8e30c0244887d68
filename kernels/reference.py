"""Plain PyTorch reference of the objective: it states what every faster implementation computes.

With s_ij the inner product of row i and column j, both of unit length, and margin β:

    contrastive = 1/N Σ_i ( Σ_{j: y_j = y_i} (1 - s_ij)  +  Σ_{j: y_j ≠ y_i} max(0, s_ij - β) )
    koleo       = -1/N Σ_i log ρ_i,   ρ_i = min_{j ≠ i} ‖z_i - z_j‖

    loss = contrastive(batch, batch) + contrastive(batch, memory) + λ koleo(batch)

These are equations 1 and 2 of El-Nouby et al. 2021 (arXiv 2102.05644), here `anchor_sum`. `nonzero_mean` divides the two sums
by the numbers of their non-zero terms instead, as pytorch-metric-learning's ContrastiveLoss with its default reducer does.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

REDUCTIONS = ("anchor_sum", "nonzero_mean")
PAIR_THRESHOLD = 1e-6  # `nonzero_mean` counts a pair whose loss exceeds this: at 0, rounding at s = 1 decides the count
KOLEO_EPS = 1e-8
KOLEO_DISTANCE_EPS = 1e-6


class ContrastiveKoLeo(NamedTuple):
    """The three parts, 0-d float32, unweighted: batch against batch, batch against memory, KoLeo."""

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

    rows (N, D) and cols (M, D): L2-normalised, any float dtype, computed in float32. row_labels (N,), col_labels (M,): integers;
    a negative one marks padding or an empty slot, whose vector may hold anything, NaN included. self_index (N,) int64:
    the column that is the row itself, hence no pair; -1 for none. A non-finite value in any other row or column gives NaN.
    Raises ValueError for an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    row_valid = row_labels >= 0
    similarity, positive, negative = _pairs(rows, row_labels, cols, col_labels, self_index, margin, reduction)
    pull, push = 1 - similarity, similarity - margin
    if reduction == "anchor_sum":
        total = torch.where(positive, pull, 0.0).sum() + torch.where(negative, push, 0.0).sum()
        loss = total / row_valid.sum().clamp(min=1)
    else:
        loss = _mean_where(pull, positive) + _mean_where(push, negative)
    return loss + similarity.detach().mul(0).sum()  # 0, or NaN where any similarity is not finite


def _pairs(rows, row_labels, cols, col_labels, self_index, margin, reduction) -> tuple[Tensor, Tensor, Tensor]:
    """(similarity, positive, negative), each (N, M): inner products in float32, and the pairs whose loss counts."""
    row_valid, col_valid = row_labels >= 0, col_labels >= 0
    rows = torch.where(row_valid[:, None], rows.float(), 0.0)
    cols = torch.where(col_valid[:, None], cols.float(), 0.0)
    with torch.autocast(rows.device.type, enabled=False):
        similarity = rows @ cols.T
    pair = row_valid[:, None] & col_valid[None, :]
    if self_index is not None:
        pair = pair & (torch.arange(cols.shape[0], device=cols.device)[None, :] != self_index[:, None])
    same = row_labels[:, None] == col_labels[None, :]
    if reduction == "anchor_sum":
        return similarity, pair & same, pair & ~same & (similarity > margin)
    costly_pull, costly_push = 1 - similarity > PAIR_THRESHOLD, similarity - margin > PAIR_THRESHOLD
    return similarity, pair & same & costly_pull, pair & ~same & costly_push


def pair_stats(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, *, self_index: Optional[Tensor], margin: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Twin of `fastirt.kernels.pair_stats`: (pos_sum, pos_count, neg_sum, neg_count)."""
    with torch.no_grad():
        similarity, positive, negative = _pairs(rows, row_labels, cols, col_labels, self_index, margin, reduction)
        nan_flag = similarity.mul(0).sum().double()
        pos_sum = torch.where(positive, 1 - similarity, 0.0).sum(dtype=torch.float64) + nan_flag
        neg_sum = torch.where(negative, similarity - margin, 0.0).sum(dtype=torch.float64)
        return pos_sum, positive.sum(), neg_sum, negative.sum()


def pair_grad(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, *, self_index: Optional[Tensor],
    scale_pos: Tensor, scale_neg: Tensor, margin: float, reduction: str,
) -> Tensor:  # fmt: skip
    """Twin of `fastirt.kernels.pair_grad`."""
    with torch.no_grad():
        _, positive, negative = _pairs(rows, row_labels, cols, col_labels, self_index, margin, reduction)
        weight = torch.where(negative, scale_neg.float(), torch.where(positive, -scale_pos.float(), 0.0))
        return (weight @ torch.where((col_labels >= 0)[:, None], cols.float(), 0.0)).to(rows.dtype)


def nearest_column(rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, row_offset: int = 0) -> Tensor:
    """(N,) int64: the column with the highest inner product, other than the row itself (row + row_offset); lowest index among
    equals, no gradient. Columns with a negative label are nobody's neighbour. Where a row has no other, or is padding: -1."""
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        similarity = rows.float() @ cols.float().T
        own = torch.arange(rows.shape[0], device=rows.device) + row_offset
        candidate = (col_labels >= 0)[None, :] & (torch.arange(cols.shape[0], device=rows.device) != own[:, None])
        similarity = torch.where(candidate, similarity, float("-inf"))  # not -1: an antipode has -1 too
        if cols.shape[0] == 0:
            return torch.full_like(own, -1)
        return torch.where(candidate.any(dim=1) & (row_labels >= 0), similarity.argmax(dim=1), -1)


def nearest(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, *, row_offset: int, distance_eps: float
) -> tuple[Tensor, Tensor]:
    """Twin of `fastirt.kernels.nearest`: (rho, index). Differentiable in rows and cols, the index held constant."""
    index = nearest_column(rows, row_labels, cols, col_labels, row_offset)
    valid = (row_labels >= 0)[:, None]
    own = torch.where(valid, rows.float(), 0.0)
    if cols.shape[0] == 0:
        return own.sum(dim=1) * 0, index
    other = torch.where(valid, cols.float()[index.clamp(min=0)], 0.0)
    rho = torch.linalg.vector_norm(own - other + distance_eps, dim=1)
    return torch.where(index >= 0, rho, 0.0) + own.detach().mul(0).sum(dim=1), index


def koleo(
    z: Tensor, labels: Optional[Tensor] = None, *, eps: float = KOLEO_EPS, distance_eps: float = KOLEO_DISTANCE_EPS
) -> Tensor:
    """-1/N sum_i log(rho_i + eps), rho_i = ||z_i - z_k + distance_eps||, k the nearest other row: a 0-d float32 tensor.

    z (N, D), any float dtype, L2-normalised. Rows with a negative label (padding) do not take part. Fewer than two rows: 0.
    The distance is taken from the difference of the vectors in float32, never from sqrt(2 - 2s); the gradient flows to both ends.
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
) -> ContrastiveKoLeo:
    """The objective's three parts for a batch z (N, D) with labels (N,), and a memory (M, D) with memory_labels (M,).

    memory_self (N,) int64 is each row's own slot in the memory (no pair), -1 for none. The memory receives no gradient.
    No memory, or no pair: that part is 0.
    """
    own = torch.arange(z.shape[0], device=z.device)
    batch = pair_loss(z, labels, z, labels, self_index=own, margin=margin, reduction=reduction)
    if memory is None:
        against_memory = torch.zeros((), device=z.device)
    else:
        against_memory = pair_loss(
            z, labels, memory.detach(), memory_labels, self_index=memory_self, margin=margin, reduction=reduction
        )
    return ContrastiveKoLeo(batch, against_memory, koleo(z, labels, eps=koleo_eps, distance_eps=koleo_distance_eps))


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 where none is."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)
