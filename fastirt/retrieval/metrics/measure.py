"""From embeddings and labels to metrics."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from fastirt.config.validate import check_ks
from fastirt.errors import UserError
from fastirt.retrieval.metrics.summary import NO_POSITIVES, QueryMetrics, summarize
from fastirt.retrieval.positives import RowLists
from fastirt.retrieval.ranks import positive_ranks

PAIRS = 2**24  # positives of the queries that are ranked at once: 128 MiB for each array of them


def retrieval_metrics(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ranks: Sequence[int],
    *,
    exclude_self: bool = False,
    exclude: Optional[Tensor] = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    gpus: int = 1,
    average: str = "query",
    same: bool = False,
    own: Optional[Tensor] = None,
) -> dict[str, Any]:
    """Rank the gallery images of each query's class, and measure the result.

    R is the number of gallery images of the query's class. Queries with R = 0 are not counted.
    The definitions and their sources stand in `per_query`; all but the median rank and the counts
    are means.

    Args:
        query: (Q, D) float32.
        query_labels: (Q,) int64, not negative.
        gallery: (G, D) float32.
        gallery_labels: (G,) int64, not negative.
        ranks: the K of Recall@K and the other metrics at K.
        exclude_self: query i is gallery row i, which is excluded from its own neighbors.
        exclude: (Q,) int64, the gallery row excluded from each query's neighbors, -1 for none.
        backend: as in `positive_ranks`.
        device: as in `positive_ranks`.
        gpus: as in `positive_ranks`.
        average: "query", or "class" for the mean over classes of the mean over a class's queries.
        same: old name of `exclude_self`.
        own: old name of `exclude`.

    Returns:
        As fractions for each distinct K `recall@K`, `precision@K`, `mp@K` and `map@K`, and for all
        K `map@r`, `r_precision`, `map`, `map_trapezoid`, `mrr` and `minp`; `median_rank`, of the
        first positive, over queries; the ends of 95 % bootstrap intervals of recall@1 and map@r,
        `ci95_low_NAME` and `ci95_high_NAME`; and the counts `queries` (with a match), `gallery` and
        `unmatched`. A backend that finds the nearest alone leaves `map`, `map_trapezoid`, `mrr`,
        `minp` and `median_rank` out: they need the ranks of all positives.

    Raises:
        UserError: an empty set, a negative label, a K below 1 or above the number of gallery images
            that a query is compared with, or no query with a match.
    """
    exclude = own if exclude is None else exclude
    if exclude_self or same:
        exclude = torch.arange(len(query))
    labelled = PositivesByLabel(query, query_labels, gallery, gallery_labels, ranks, exclude)
    parts = []
    for first, stop in labelled.parts:
        found = positive_ranks(
            query[first:stop],
            gallery,
            *labelled.lists(first, stop),
            backend=backend,
            device=device,
            gpus=gpus,
            depth=labelled.depth,
        )
        parts.append(QueryMetrics.of_ranks(found, ranks, labelled.largest))
    return {**summarize(QueryMetrics.joined(parts), query_labels, average), "gallery": len(gallery)}


class PositivesByLabel:
    """The positives of each query: the gallery images of its class, its own file left out.

    Arguments and errors are those of `retrieval_metrics`.

    Attributes:
        largest: number of positives of a query, at most.
        depth: ranks that the metrics at `ks` need.
        parts: [(first query, stop)] of all queries in order, each of about PAIRS positives: a set
            of few large classes has more than fit in memory.
    """

    def __init__(
        self,
        query: Tensor,
        query_labels: Tensor,
        gallery: Tensor,
        gallery_labels: Tensor,
        ks: Sequence[int],
        exclude: Optional[Tensor] = None,
    ) -> None:
        _check(query, query_labels, gallery, gallery_labels)
        exclude = torch.full((len(query),), -1) if exclude is None else exclude
        excludes = bool((exclude >= 0).any())
        check_ks(ks, len(gallery) - excludes, beside_query=excludes)
        self._labels, self._exclude = (query_labels, gallery_labels), exclude
        classes = int(max(query_labels.max(), gallery_labels.max())) + 1
        counts = torch.bincount(gallery_labels, minlength=classes)[query_labels]
        counts = counts - ((exclude >= 0) & (gallery_labels[exclude] == query_labels)).long()
        self.largest = int(counts.max())
        if self.largest == 0:
            raise UserError(NO_POSITIVES)
        self.depth = max([*ks, self.largest])
        part = counts.cumsum(0) // PAIRS
        starts = [0, *((part[1:] != part[:-1]).nonzero().flatten() + 1).tolist(), len(query)]
        self.parts = list(zip(starts, starts[1:]))

    def lists(self, first: int, stop: int) -> tuple[RowLists, RowLists]:
        """(positives, ignored rows) of some queries."""
        ignored = RowLists.of_column(self._exclude[first:stop])
        return RowLists.of_labels(self._labels[0][first:stop], self._labels[1]).without(ignored), ignored


def _check(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> None:
    for name, vectors, labels in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        if len(vectors) == 0:
            raise UserError(f"the {name} set is empty: there is nothing to measure")
        if len(vectors) != len(labels):
            raise UserError(f"the {name} set has {len(vectors)} vectors and {len(labels)} labels: pass one label each")
        if int(labels.min()) < 0:
            raise UserError(f"the {name} set has the label {int(labels.min())}: labels must not be negative")
