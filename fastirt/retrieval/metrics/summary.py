"""The numbers of `metrics.json`: means over queries or classes, and how sure they are."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from fastirt.config.components import AVERAGES
from fastirt.errors import UserError
from fastirt.retrieval.metrics import per_query
from fastirt.retrieval.metrics.bootstrap import bootstrap_intervals
from fastirt.retrieval.positives import PositiveRanks

WITH_INTERVAL = ("recall@1", "map@r")
LOW, HIGH = "ci95_low_", "ci95_high_"  # before the name of a metric: the ends of its 95 % interval
NO_POSITIVES = "no query has an image of its class in the gallery"


class QueryMetrics(NamedTuple):
    """The metrics of each of Q queries.

    Attributes:
        values: (Q,) float64 by name, NaN for a query without positives.
        first_rank: (Q,) float64 rank of the first positive, for the median rank; None if it needs
            ranks beyond the known ones.
        counts: (Q,) int64 number of positives.
    """

    values: dict[str, Tensor]
    first_rank: Optional[Tensor]
    counts: Tensor

    @staticmethod
    def of_ranks(ranks: PositiveRanks, ks: Sequence[int], largest: int) -> QueryMetrics:
        """largest: number of positives of any query, also of those that are measured elsewhere."""
        values = {name: metric(ranks) for name, metric in _metrics(ranks.depth, ks, largest).items()}
        return QueryMetrics(values, per_query.first_rank(ranks) if ranks.depth is None else None, ranks.counts)

    @staticmethod
    def joined(parts: Sequence[QueryMetrics]) -> QueryMetrics:
        """Of all parts' queries: the metrics that all parts have."""
        names = [name for name in parts[0].values if all(name in part.values for part in parts)]
        first = [part.first_rank for part in parts]
        return QueryMetrics(
            {name: torch.cat([part.values[name] for part in parts]) for name in names},
            None if any(rank is None for rank in first) else torch.cat(first),
            torch.cat([part.counts for part in parts]),
        )


def summarize(
    queries: QueryMetrics, labels: Optional[Tensor] = None, average: str = "query", seed: int = 0
) -> dict[str, Any]:
    """The means of all metrics over the queries that have positives.

    Args:
        queries: the metrics of Q queries.
        labels: (Q,) int64 classes of the queries, for "class".
        average: "query", or "class" for the mean over classes of the mean over a class's queries.
        seed: of the bootstrap, which draws queries or classes.

    Returns:
        As `retrieval_metrics`, without `gallery`.

    Raises:
        UserError: no query has a positive.
    """
    matched = queries.counts > 0
    if not matched.any():
        raise UserError(NO_POSITIVES)
    averaged = partial(_averaged, matched=matched, labels=_averaged_labels(labels, average))
    values = {name: averaged(each) for name, each in queries.values.items()}
    metrics: dict[str, Any] = {name: float(each.sum()) / len(each) for name, each in values.items()}
    if queries.first_rank is not None:
        metrics["median_rank"] = float(np.median(queries.first_rank[matched].numpy()))
    names = [name for name in WITH_INTERVAL if name in values]
    if names:
        ends = bootstrap_intervals(torch.stack([values[name] for name in names], dim=1), seed)
        for name, (low, high) in zip(names, ends.tolist()):
            metrics |= {LOW + name: low, HIGH + name: high}
    return {**metrics, "queries": int(matched.sum()), "unmatched": int((~matched).sum())}


def _averaged_labels(labels: Optional[Tensor], average: str) -> Optional[Tensor]:
    if average not in AVERAGES:
        raise ValueError(f"average {average!r}: use one of {', '.join(AVERAGES)}")
    if average == "class" and labels is None:
        raise ValueError("average 'class' needs labels")
    return labels if average == "class" else None


def _averaged(values: Tensor, matched: Tensor, labels: Optional[Tensor]) -> Tensor:
    """What a mean is of: the values of queries with positives, or with labels their class means."""
    if labels is None:
        return values[matched]
    groups = labels[matched].unique(return_inverse=True)[1]
    sizes = torch.bincount(groups)
    return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, values[matched]) / sizes


def _metrics(depth: Optional[int], ks: Sequence[int], largest: int) -> dict[str, Callable[[PositiveRanks], Tensor]]:
    """Those that ranks up to a depth determine; the first one chooses the best model."""
    known = math.inf if depth is None else depth
    ks = [k for k in sorted(set(ks)) if k <= known]
    metrics: dict[str, Callable[[PositiveRanks], Tensor]] = {}
    metrics.update({f"recall@{k}": partial(per_query.recall, k=k) for k in ks})
    if largest <= known:
        metrics.update({"map@r": per_query.average_precision_at_r, "r_precision": per_query.r_precision})
    if depth is None:
        metrics["map"] = per_query.average_precision
        metrics["map_trapezoid"] = per_query.average_precision_trapezoid
        metrics["mrr"] = per_query.reciprocal_rank
        metrics["minp"] = per_query.inverse_negative_penalty
    for k in ks:
        metrics[f"precision@{k}"] = partial(per_query.precision, k=k)
        metrics[f"mp@{k}"] = partial(per_query.bounded_precision, k=k)
        metrics[f"map@{k}"] = partial(per_query.average_precision, k=k)
    return metrics
