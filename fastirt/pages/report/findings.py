"""What is worth looking at among a run's neighbors: rows of failures, doubles, hubs and more."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from fastirt.pages.report.neighbors import Neighbors

DOUBLE = 0.98  # cosine from which two images are called doubles
AGREEING = 5  # neighbors that must agree on another label before a query's own is doubted


def failures(found: Neighbors) -> np.ndarray:
    """Queries whose nearest image is wrong, the one with the latest right image first."""
    rank = np.where(found.counted, found.first_rank, 0)
    order = np.lexsort((-found.similarity[:, 0], -rank))
    return order[rank[order] > 1]


class Confusion(NamedTuple):
    """Two classes: `mistakes` queries of one have an image of the other nearest, of `queries`."""

    labels: tuple[int, int]
    mistakes: int
    queries: int
    example: int  # query


def confusions(found: Neighbors, most: int) -> tuple[list[Confusion], int]:
    """(pairs of classes that are taken for each other, those with the most wrong queries first; the
    number of all such pairs)."""
    nearest = found.gallery_labels[found.rows[:, 0]]
    wrong = np.flatnonzero((nearest != found.query_labels) & found.counted)
    pairs = np.sort(np.stack([found.query_labels[wrong], nearest[wrong]], 1), axis=1)
    if not len(pairs):
        return [], 0
    distinct, which, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    sizes = np.bincount(found.query_labels, minlength=int(distinct.max()) + 1)
    which, result = which.reshape(-1), []
    shares = counts / sizes[distinct].sum(axis=1)
    for place in np.lexsort((-shares, -counts))[:most]:
        own = wrong[which == place]
        example = own[found.similarity[own, 0].argmax()]
        a, b = (int(label) for label in distinct[place])
        result.append(Confusion((a, b), int(counts[place]), int(sizes[a] + sizes[b]), int(example)))
    return result, len(distinct)


def doubles(found: Neighbors, same_split: bool) -> list[tuple[int, int]]:
    """(query, place of its neighbor) of pairs of cosine DOUBLE or more, the most similar first.

    same_split: gallery rows are query rows, so that each pair is there twice: the first is kept.
    """
    pairs = np.argwhere(found.similarity >= DOUBLE)
    pairs = pairs[np.argsort(-found.similarity[pairs[:, 0], pairs[:, 1]], kind="stable")]
    kept, seen = [], set()
    for query, place in pairs.tolist():
        row, other = int(found.queries[query]), int(found.rows[query, place])
        key = (min(row, other), max(row, other)) if same_split else (row, other)
        if key not in seen:
            seen.add(key)
            kept.append((query, place))
    return kept


def doubtful_labels(found: Neighbors) -> list[int]:
    """Queries whose AGREEING nearest images are all of one other class, the most similar first."""
    if found.rows.shape[1] < AGREEING:
        return []
    labels = found.gallery_labels[found.rows[:, :AGREEING]]
    agree = (labels == labels[:, :1]).all(axis=1) & (labels[:, 0] != found.query_labels)
    queries = np.flatnonzero(agree)
    return queries[np.argsort(-found.similarity[queries, :AGREEING].mean(axis=1), kind="stable")].tolist()


class Hub(NamedTuple):
    """A gallery row among the nearest K of `times` queries, `wrong` of which are of other classes;
    `query` is the nearest of these."""

    row: int
    times: int
    wrong: int
    query: int


def hubs(found: Neighbors, most: int) -> tuple[list[Hub], float]:
    """(gallery images that are neighbors of the most queries of other classes, the mean number of
    queries that a gallery image is a neighbor of)."""
    size, misses = len(found.gallery_labels), ~found.hits
    counts = np.bincount(found.rows.reshape(-1), minlength=size)
    wrong = np.bincount(found.rows[misses], minlength=size)
    result = []
    for row in np.argsort(-wrong, kind="stable")[:most]:
        if wrong[row] < 2:
            break
        queries, places = np.nonzero((found.rows == row) & misses)
        nearest = queries[found.similarity[queries, places].argmax()]
        result.append(Hub(int(row), int(counts[row]), int(wrong[row]), int(nearest)))
    return result, found.rows.size / size


class Comparison(NamedTuple):
    """Two runs on the same queries, as (query of the first, query of the second).

    Attributes:
        won: the first run's nearest image is right, the second's is wrong; the second's worst
            first.
        lost: the other way round.
        both: number of queries that both get right.
        neither: number that both get wrong.
    """

    won: list[tuple[int, int]]
    lost: list[tuple[int, int]]
    both: int
    neither: int

    @property
    def p_value(self) -> float:
        """Two-sided sign test (McNemar's exact test) of won against lost."""
        n, least = len(self.won) + len(self.lost), min(len(self.won), len(self.lost))
        tail = sum(math.exp(_log_choose(n, k) - n * math.log(2)) for k in range(least + 1))
        return min(1.0, 2 * tail)


def compare(first: Neighbors, second: Neighbors, names: Sequence[list[str]]) -> Comparison:
    """Compare two runs query by query; `names` of their queries say which are the same."""
    place = {name: query for query, name in enumerate(names[1])}
    pairs = [(query, place[name]) for query, name in enumerate(names[0]) if name in place]
    pairs = [(a, b) for a, b in pairs if first.counted[a] and second.counted[b]]
    won = [(a, b) for a, b in pairs if first.first_rank[a] == 1 < second.first_rank[b]]
    lost = [(a, b) for a, b in pairs if second.first_rank[b] == 1 < first.first_rank[a]]
    both = sum(bool(first.first_rank[a] == 1 == second.first_rank[b]) for a, b in pairs)
    won.sort(key=lambda pair: -second.first_rank[pair[1]])
    lost.sort(key=lambda pair: -first.first_rank[pair[0]])
    return Comparison(won, lost, both, len(pairs) - both - len(won) - len(lost))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
