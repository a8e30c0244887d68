"""Plain PyTorch reference of the objective: it states what every faster implementation computes.

Sources: El-Nouby et al. 2021 (arXiv 2102.05644), equations 1 and 2, for `anchor_sum` and KoLeo;
pytorch-metric-learning's ContrastiveLoss with its default reducer for `nonzero_mean`.
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
    self_cols: Optional[Tensor] = None,
    margin: float = 0.5,
    reduction: str = "anchor_sum",
) -> Tensor:
    """Contrastive loss of every row against every column, a 0-d float32 tensor.

    rows (N, D) and cols (M, D): L2-normalised, any float dtype, computed in float32. row_labels (N,), col_labels (M,): integers;
    a negative one marks padding or an empty slot, whose vector may hold anything, NaN included. self_cols (N,) int64:
    the column that is the row itself, hence no pair; -1 for none. A non-finite value in any other row or column gives NaN.
    Raises ValueError for an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    row_valid, col_valid = row_labels >= 0, col_labels >= 0
    rows = torch.where(row_valid[:, None], rows.float(), 0.0)
    cols = torch.where(col_valid[:, None], cols.float(), 0.0)
    with torch.autocast(rows.device.type, enabled=False):
        similarity = rows @ cols.T  # (N, M)
    pair = row_valid[:, None] & col_valid[None, :]
    if self_cols is not None:
        pair = pair & (torch.arange(cols.shape[0], device=cols.device)[None, :] != self_cols[:, None])
    same = row_labels[:, None] == col_labels[None, :]
    positive, negative = pair & same, pair & ~same
    pull, push = 1 - similarity, similarity - margin
    if reduction == "anchor_sum":
        total = torch.where(positive, pull, 0.0).sum() + torch.where(negative, push.clamp(min=0), 0.0).sum()
        loss = total / row_valid.sum().clamp(min=1)
    else:
        loss = _mean_where(pull, positive & (pull > PAIR_THRESHOLD)) + _mean_where(
            push, negative & (push > PAIR_THRESHOLD)
        )
    return loss + similarity.detach().mul(0).sum()  # 0, or NaN where any similarity is not finite


def nearest(z: Tensor, labels: Optional[Tensor] = None) -> Tensor:
    """(N,) int64: the other row with the highest inner product, the lowest index among equals; no gradient.

    Rows with a negative label are nobody's neighbour. Where a row has no other, the index is 0.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        vectors = z.detach().float()
        similarity = vectors @ vectors.T
        similarity.fill_diagonal_(float("-inf"))  # not -1: an antipode has -1 too
        if labels is not None:
            similarity.masked_fill_((labels < 0)[None, :], float("-inf"))
        return similarity.argmax(dim=1)


def koleo(
    z: Tensor, labels: Optional[Tensor] = None, *, eps: float = KOLEO_EPS, distance_eps: float = KOLEO_DISTANCE_EPS
) -> Tensor:
    """-1/N sum_i log(rho_i + eps), rho_i = ||z_i - z_k + distance_eps||, k the nearest other row: a 0-d float32 tensor.

    z (N, D), any float dtype, L2-normalised. Rows with a negative label (padding) do not take part. Fewer than two rows: 0.
    The distance is taken from the difference of the vectors in float32, never from sqrt(2 - 2s); the gradient flows to both ends.
    """
    valid = torch.ones(z.shape[0], dtype=torch.bool, device=z.device) if labels is None else labels >= 0
    count = valid.sum()
    vectors = torch.where(valid[:, None], z.float(), 0.0)
    rho = torch.linalg.vector_norm(vectors - vectors[nearest(vectors, labels)] + distance_eps, dim=1)
    terms = torch.where(valid & (count > 1), -torch.log(rho + eps), 0.0)
    return terms.sum() / count.clamp(min=1) + vectors.detach().mul(0).sum()


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
    batch = pair_loss(z, labels, z, labels, self_cols=own, margin=margin, reduction=reduction)
    if memory is None:
        against_memory = torch.zeros((), device=z.device)
    else:
        against_memory = pair_loss(
            z, labels, memory.detach(), memory_labels, self_cols=memory_self, margin=margin, reduction=reduction
        )
    return ContrastiveKoLeo(batch, against_memory, koleo(z, labels, eps=koleo_eps, distance_eps=koleo_distance_eps))


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 where none is."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)
