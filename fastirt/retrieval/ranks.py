"""The rank of each positive: 1 + the number of gallery rows that are more similar to the query.

Metrics of retrieval are functions of these ranks, so counting replaces any selection of neighbors.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from fastirt.retrieval.counting import Block, exact_similarities, listed_similarities, pair_similarities, quanta
from fastirt.retrieval.positives import UNRANKED, PositiveRanks, RowLists
from fastirt.retrieval.rank_backends import BLOCK_VALUES, Searching, choose_backend
from fastirt.retrieval.search import full_precision

CROSSED = 2**22  # comparisons of ignored rows with positives at once


def positive_ranks(
    query: Tensor,
    gallery: Tensor,
    positives: RowLists,
    ignored: Optional[RowLists] = None,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    gpus: int = 1,
    depth: Optional[int] = None,
    progress: bool = False,
) -> PositiveRanks:
    """The rank of each positive among the gallery rows that its query does not ignore.

    A positive's rank is 1 + the number of these rows that are more similar to the query, or equally
    similar and earlier in the gallery. The similarity is the inner product, summed in float64 and
    rounded to 2^-24 of the largest value that the vectors' lengths allow, so identical gallery rows
    have identical similarities. All backends give the same ranks.

    Args:
        query: (Q, D) float32, finite.
        gallery: (G, D) float32, finite.
        positives: gallery rows of each query; those that it ignores are left out.
        ignored: gallery rows that each query's ranking does not contain; None: none.
        backend: "ranks" counts. "faiss" and "torch" find the `depth` nearest rows and count among
            them. "auto" is "faiss" on a GPU up to its limit of k, otherwise "ranks".
        device: where to compute.
        gpus: number of this machine's GPUs over which the gallery is spread.
        depth: ranks above it may be left UNRANKED; None: all are needed.
        progress: show a progress bar.

    Raises:
        ValueError: a vector is not finite, or vectors are so long that products overflow.
    """
    device = torch.device(device)
    ignored = RowLists.of_lists([[]] * len(query)) if ignored is None else ignored
    positives = positives.without(ignored)
    if not len(positives.rows):
        return PositiveRanks(positives.rows, positives.starts, positives.rows)
    quantum, longest = quanta(query, gallery)
    if not torch.isfinite(longest).all():
        raise ValueError("query and gallery: vectors must be finite, and their products too")
    similarity = listed_similarities(query, gallery, quantum, positives)
    order = similarity.argsort(descending=True, stable=True)
    order = order[positives.queries[order].argsort(stable=True)]
    similarity, rows = similarity[order], positives.rows[order]
    count = choose_backend(
        backend, gallery, None if depth is None else depth + 1 + int(ignored.counts.max()), device, gpus
    )
    error = count.rounding(query.shape[1]) * longest
    ahead = torch.zeros_like(rows)
    bar = tqdm(total=len(query), desc="ranks", unit="query", disable=None if progress else True, leave=False)

    def counted(queries: Tensor) -> tuple[Tensor, Tensor]:
        places = positives.places(queries)  # (B, R)
        valid = places >= 0
        near, slack = torch.where(valid, similarity[places], torch.inf), error[queries, None]
        at = torch.where(valid, rows[places], -1)
        block = Block(query[queries], quantum[queries], near, at, (near - slack).float(), (near + slack).float())
        return places[valid], count(block)[valid]

    with bar, full_precision(), _threads(count.threads) as run:
        for places, number in run(counted, _blocks(positives.counts, count.block)):
            ahead[places] = number
            bar.update(int((number == 0).sum()))
    found = ahead < UNRANKED
    ahead -= _ignored_ahead(query, gallery, quantum, ignored, RowLists(rows, positives.starts), similarity)
    if not isinstance(count, Searching) or depth is None:
        return PositiveRanks(ahead + 1, positives.starts, rows)
    return PositiveRanks(torch.where(found & (ahead < depth), ahead + 1, UNRANKED), positives.starts, rows, depth)


def reference_ranks(
    query: Tensor, gallery: Tensor, positives: RowLists, ignored: Optional[RowLists] = None
) -> PositiveRanks:
    """What `positive_ranks` computes, by sorting all similarities: for tests."""
    ignored = RowLists.of_lists([[]] * len(query)) if ignored is None else ignored
    similarity = exact_similarities(query, gallery, quanta(query, gallery)[0])
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return PositiveRanks.of_rankings(order.tolist(), positives.without(ignored), ignored)


def _blocks(counts: Tensor, size: int) -> Iterator[Tensor]:
    """Queries with positives, those with the most first, so that a block needs little padding."""
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    while len(order):
        taken = max(1, min(size, BLOCK_VALUES // int(counts[order[0]])))
        yield order[:taken]
        order = order[taken:]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """A `map` whose calls run in `count` threads, each of which computes alone.

    A block of queries for each thread, because threads that share a block wait for each other after
    every operation, of which many take less than a millisecond.
    """
    if count == 1:
        yield map
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "fastirt-ranks", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _ignored_ahead(
    query: Tensor, gallery: Tensor, quantum: Tensor, ignored: RowLists, positives: RowLists, similarity: Tensor
) -> Tensor:
    """(P,) int64: the ignored rows that are ahead of each positive, of (P,) similarity."""
    ahead = torch.zeros_like(positives.rows)
    # Those of queries without positives are of no use.
    chosen = positives.counts[ignored.queries].nonzero().flatten()
    queries, ignored_rows = ignored.queries[chosen], ignored.rows[chosen]
    theirs = pair_similarities(query, gallery, quantum, queries, ignored_rows)
    chunk = max(1, CROSSED // max(1, int(positives.counts.max())))
    for first in range(0, len(queries), chunk):
        some = slice(first, first + chunk)
        places = positives.places(queries[some])
        valid = places >= 0
        tied_ahead = ignored_rows[some, None] < positives.rows[places]
        is_ahead = (theirs[some, None] > similarity[places]) | ((theirs[some, None] == similarity[places]) & tied_ahead)
        ahead.index_add_(0, places[valid], is_ahead[valid].long())
    return ahead
