"""What a run finds for a sample of its queries, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastirt.pages.report.embedded_run import EmbeddedRun
from fastirt.retrieval.counting import listed_similarities, quanta
from fastirt.retrieval.metrics import PositivesByLabel, per_query
from fastirt.retrieval.ranks import positive_ranks
from fastirt.retrieval.search import search

MAX_QUERIES = 10_000  # that are searched for, a sample of a larger test split
NEIGHBORS = 10  # found for each
SPARE = 6  # more that are compared exactly, because the search rounds otherwise than the ranks
PAIRS = 200_000  # of positives and of negatives, for the histograms
PCA_VECTORS = 20_000  # of the gallery, for the energy


@dataclass(frozen=True)
class Neighbors:
    """The neighbors of S queries; rows are those of the embeddings, not of the splits.

    Attributes:
        queries: (S,) int64 rows of the queries' embeddings.
        query_labels: (S,) int64.
        gallery_labels: (G,) int64.
        rows: (S, K) int64 gallery rows, the most similar first.
        similarity: (S, K) float64 cosines.
        first_rank: (S,) float64 rank of the first right image; NaN for a query without one.
        first_row: (S,) int64 its gallery row, -1 for none.
        first_similarity: (S,) float64 its cosine.
    """

    queries: np.ndarray
    query_labels: np.ndarray
    gallery_labels: np.ndarray
    rows: np.ndarray
    similarity: np.ndarray
    first_rank: np.ndarray
    first_row: np.ndarray
    first_similarity: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """(S, K) bool: whether a neighbor is of the query's class."""
        return self.gallery_labels[self.rows] == self.query_labels[:, None]

    @property
    def counted(self) -> np.ndarray:
        """(S,) bool: queries that have a right image at all."""
        return np.isfinite(self.first_rank)


def find_neighbors(run: EmbeddedRun) -> Neighbors:
    """Search for the queries of a run: all, or a sample of MAX_QUERIES.

    Raises UserError: no query has a readable image of its class to find.
    """
    device = torch.device(run.config.run.device)
    queries = torch.from_numpy(sample(len(run.query.rows), MAX_QUERIES))
    vectors, gallery, exclude = run.query.vectors[queries], run.gallery.vectors, run.exclude[queries]
    query_labels, gallery_labels = run.labels
    query_labels = query_labels[queries]
    first_rank, first_row = _first_positives(vectors, query_labels, gallery, gallery_labels, exclude, device)
    rows, similarity = [], []
    quantum = quanta(vectors, gallery)[0]
    for first, _, found in search(vectors, gallery, NEIGHBORS + SPARE, exclude=exclude, device=device):
        some = slice(first, first + len(found))
        exact = listed_similarities(vectors[some], gallery, quantum[some], found)
        order = found.argsort(dim=1, stable=True)
        found, exact = found.gather(1, order), exact.gather(1, order)
        order = exact.argsort(dim=1, descending=True, stable=True)[:, :NEIGHBORS]
        rows.append(found.gather(1, order))
        similarity.append(exact.gather(1, order))
    first_similarity = listed_similarities(vectors, gallery, quantum, first_row[:, None])[:, 0]
    return Neighbors(
        queries.numpy(),
        query_labels.numpy(),
        gallery_labels.numpy(),
        torch.cat(rows).numpy(),
        torch.cat(similarity).numpy(),
        first_rank.numpy(),
        first_row.numpy(),
        first_similarity.numpy(),
    )


def _first_positives(
    vectors: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    exclude: torch.Tensor,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank, gallery row) of each query's first positive: exact, as the metrics count it."""
    labelled = PositivesByLabel(vectors, query_labels, gallery, gallery_labels, [1], exclude)
    first_rank, first_row = [], []
    for first, stop in labelled.parts:
        lists = labelled.lists(first, stop)
        ranks = positive_ranks(vectors[first:stop], gallery, *lists, backend="ranks", device=device)
        there = ranks.counts > 0
        row = torch.full((stop - first,), -1)
        row[there] = ranks.rows[ranks.starts[:-1][there]]
        first_rank.append(per_query.first_rank(ranks))
        first_row.append(row)
    return torch.cat(first_rank), torch.cat(first_row)


def sample(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` rows, ascending, the same at each call."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def cosine_sample(run: EmbeddedRun) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of random (positive, negative) pairs of a query and a gallery image, at most PAIRS
    of each."""
    rng = np.random.default_rng(0)
    query_labels, gallery_labels = (labels.numpy() for labels in run.labels)
    exclude = run.exclude.numpy()
    classes = int(max(query_labels.max(), gallery_labels.max())) + 1
    sizes = np.bincount(gallery_labels, minlength=classes)
    starts, by_class = sizes.cumsum() - sizes, gallery_labels.argsort(kind="stable")
    query = rng.integers(0, len(query_labels), PAIRS)
    query = query[sizes[query_labels[query]] > 0]
    label = query_labels[query]
    place = starts[label] + (rng.random(len(query)) * sizes[label]).astype(np.int64)
    positive = by_class[place]
    kept = positive != exclude[query]
    others = rng.integers(0, len(query_labels), PAIRS), rng.integers(0, len(gallery_labels), PAIRS)
    unlike = query_labels[others[0]] != gallery_labels[others[1]]
    return (
        _cosines(run, query[kept], positive[kept]),
        _cosines(run, others[0][unlike], others[1][unlike]),
    )


def _cosines(run: EmbeddedRun, query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    parts = [
        (run.query.vectors[query[first : first + 8192]] * run.gallery.vectors[gallery[first : first + 8192]]).sum(1)
        for first in range(0, len(query), 8192)
    ]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def pca_energy(run: EmbeddedRun) -> np.ndarray:
    """(D,) cumulative share of the gallery's variance in its first principal directions."""
    vectors = run.gallery.vectors[torch.from_numpy(sample(len(run.gallery.rows), PCA_VECTORS))].double()
    vectors -= vectors.mean(dim=0)
    values = torch.linalg.eigvalsh(vectors.T @ vectors).flip(0).clamp(min=0)
    total = values.sum()
    return (values.cumsum(0) / total if total > 0 else torch.ones_like(values)).numpy()
