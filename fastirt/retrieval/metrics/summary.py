"""The numbers of `metrics.json`: means over queries or classes, and how sure they are."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, Optional, Sequence

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


def summarize(
    ranks: PositiveRanks, ks: Sequence[int], labels: Optional[Tensor] = None, average: str = "query", seed: int = 0
) -> dict[str, Any]:
    """The means of all metrics over the queries that have positives.

    Args:
        ranks: of the positives of Q queries.
        ks: the K of Recall@K, precision@K, mP@K and mAP@K.
        labels: (Q,) int64 classes of the queries, for "class".
        average: "query", or "class" for the mean over classes of the mean over a class's queries.
        seed: of the bootstrap, which draws queries or classes.

    Returns:
        As `retrieval_metrics`, without `gallery`. Metrics that need ranks beyond `ranks.depth` are
        left out.

    Raises:
        UserError: no query has a positive.
    """
    matched = ranks.counts > 0
    if not matched.any():
        raise UserError(NO_POSITIVES)
    averaged = partial(_averaged, matched=matched, labels=_averaged_labels(labels, average))
    values = {name: averaged(metric(ranks)) for name, metric in _means(ranks, ks).items()}
    metrics: dict[str, Any] = {name: float(each.sum()) / len(each) for name, each in values.items()}
    if ranks.depth is None:
        metrics["median_rank"] = float(np.median(per_query.first_rank(ranks)[matched].numpy()))
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


def _means(ranks: PositiveRanks, ks: Sequence[int]) -> dict[str, Callable[[PositiveRanks], Tensor]]:
    """The metrics that the known ranks determine; the first one chooses the best model."""
    known = math.inf if ranks.depth is None else ranks.depth
    ks = [k for k in sorted(set(ks)) if k <= known]
    means: dict[str, Callable[[PositiveRanks], Tensor]] = {}
    means.update({f"recall@{k}": partial(per_query.recall, k=k) for k in ks})
    if int(ranks.counts.max()) <= known:
        means.update({"map@r": per_query.average_precision_at_r, "r_precision": per_query.r_precision})
    if ranks.depth is None:
        means["map"] = per_query.average_precision
        means["map_trapezoid"] = per_query.average_precision_trapezoid
        means["mrr"] = per_query.reciprocal_rank
        means["minp"] = per_query.inverse_negative_penalty
    for k in ks:
        means[f"precision@{k}"] = partial(per_query.precision, k=k)
        means[f"mp@{k}"] = partial(per_query.bounded_precision, k=k)
        means[f"map@{k}"] = partial(per_query.average_precision, k=k)
    return means
