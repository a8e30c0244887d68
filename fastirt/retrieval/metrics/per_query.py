"""Metrics of each query, (Q,) float64, from the ranks of its positives.

A query has R positives, of ranks r_1 < ... < r_R among the gallery rows that it does not ignore.
UNRANKED positives count as not found. The metrics of a query without positives are NaN.

With `PositiveRanks.depth`, ranks above it are unknown: `recall`, `precision`, `average_precision`
and `bounded_precision` hold for k up to the depth, and the others need complete ranks.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.retrieval.positives import UNRANKED, PositiveRanks


def recall(ranks: PositiveRanks, k: int) -> Tensor:
    """Recall@K of image retrieval: 1 if r_1 <= k, otherwise 0.

    Jegou, Douze and Schmid 2011, "Product quantization for nearest neighbor search". It is the
    share of queries with a match among the K nearest, not the share of the positives found.
    """
    return _of_matched(ranks, found(ranks, k) > 0)


def precision(ranks: PositiveRanks, k: int) -> Tensor:
    """Precision@K: the share of positives among the k nearest, (number of r_j <= k) / k.

    It is at most R / k. Manning, Raghavan and Schuetze 2008, "Introduction to information
    retrieval", section 8.4.
    """
    return _of_matched(ranks, found(ranks, k).double() / k)


def bounded_precision(ranks: PositiveRanks, k: int) -> Tensor:
    """mP@K of revisited Oxford and Paris: precision at k' = min(k, rank of the last positive).

    The last positive is the last one that the ranking contains; without any the value is 0.
    Radenovic et al. 2018, "Revisiting Oxford and Paris", and its evaluation code.
    """
    contained = ranks.counts if ranks.depth is not None else found(ranks, UNRANKED - 1)
    bound = _rank_at(ranks, contained - 1).clamp(max=k)
    return _of_matched(ranks, found(ranks, bound).double() / bound)


def r_precision(ranks: PositiveRanks) -> Tensor:
    """R-precision: the share of positives among the R nearest, (number of r_j <= R) / R.

    Musgrave, Belongie and Lim 2020, "A metric learning reality check", section 3.2.
    """
    return found(ranks, ranks.counts).double() / ranks.counts


def average_precision(ranks: PositiveRanks, k: Optional[int] = None) -> Tensor:
    """AP, the mean of j / r_j over the positives; AP@K with k.

    AP@K is (sum of j / r_j over r_j <= k) / min(k, R), so that a perfect ranking has 1. Other texts
    divide by R or by the number of positives found.
    Manning, Raghavan and Schuetze 2008, section 8.4.
    """
    limit = UNRANKED - 1 if k is None else k
    return _precision_sums(ranks, limit) / ranks.counts.clamp(max=limit)


def average_precision_at_r(ranks: PositiveRanks) -> Tensor:
    """The term of MAP@R: (sum of j / r_j over r_j <= R) / R.

    Musgrave, Belongie and Lim 2020, section 3.2.
    """
    return _precision_sums(ranks, ranks.counts) / ranks.counts


def average_precision_trapezoid(ranks: PositiveRanks) -> Tensor:
    """AP as the area below the precision-recall curve by the trapezoid rule.

    The mean over the positives of (p + j / r_j) / 2, where p = (j - 1) / (r_j - 1) is the precision
    just before the positive, 1 at the first rank. Philbin et al. 2007, "Object retrieval with large
    vocabularies and fast spatial matching"; Radenovic et al. 2018.
    """
    place, rank = _places(ranks).double(), ranks.ranks.double()
    before = torch.where(rank > 1, (place - 1) / (rank - 1).clamp(min=1), 1.0)
    return _sums(ranks, ((before + place / rank) / 2).where(ranks.ranks < UNRANKED, 0)) / ranks.counts


def reciprocal_rank(ranks: PositiveRanks) -> Tensor:
    """1 / r_1, the term of MRR; 0 if no positive is found.

    Voorhees 1999, "The TREC-8 question answering track report".
    """
    return 1 / first_rank(ranks)


def inverse_negative_penalty(ranks: PositiveRanks) -> Tensor:
    """R / r_R, the term of mINP; 0 if the last positive is not found.

    Ye et al. 2021, "Deep learning for person re-identification: a survey and outlook", section 4.1.
    """
    return _of_matched(ranks, ranks.counts / _or_infinite(_rank_at(ranks, ranks.counts - 1)))


def first_rank(ranks: PositiveRanks) -> Tensor:
    """r_1, whose median over queries is the median rank; infinite if no positive is found."""
    return _of_matched(ranks, _or_infinite(_rank_at(ranks, torch.zeros_like(ranks.counts))))


def found(ranks: PositiveRanks, k: int | Tensor) -> Tensor:
    """Number of positives of rank up to k, an int or (Q,) int64; itself (Q,) int64."""
    return _sums(ranks, ranks.ranks <= _of_positives(ranks, k)).long()


def _precision_sums(ranks: PositiveRanks, k: int | Tensor) -> Tensor:
    """The sum of j / r_j over r_j <= k."""
    return _sums(ranks, (_places(ranks) / ranks.ranks.double()).where(ranks.ranks <= _of_positives(ranks, k), 0))


def _places(ranks: PositiveRanks) -> Tensor:
    """(P,) int64: j of each positive, from 1."""
    return torch.arange(1, len(ranks.ranks) + 1) - ranks.starts[ranks.queries]


def _of_positives(ranks: PositiveRanks, k: int | Tensor) -> int | Tensor:
    return k[ranks.queries] if isinstance(k, Tensor) else k


def _sums(ranks: PositiveRanks, values: Tensor) -> Tensor:
    """(P,) values summed by query, in the order of the ranks."""
    return torch.zeros(len(ranks.counts), dtype=torch.float64).index_add_(0, ranks.queries, values.double())


def _rank_at(ranks: PositiveRanks, place: Tensor) -> Tensor:
    """(Q,) int64: the rank of the positive at each query's place, from 0; UNRANKED without one."""
    there = (place >= 0) & (place < ranks.counts)
    rank = torch.full_like(place, UNRANKED)
    rank[there] = ranks.ranks[(ranks.starts[:-1] + place)[there]]
    return rank


def _or_infinite(rank: Tensor) -> Tensor:
    return rank.double().masked_fill(rank == UNRANKED, torch.inf)


def _of_matched(ranks: PositiveRanks, values: Tensor) -> Tensor:
    """The values as float64, NaN for queries without positives."""
    return values.double().masked_fill(ranks.counts == 0, torch.nan)
