"""The rank of each positive: 1 + the number of gallery rows that are more similar to the query.

Metrics of retrieval are functions of these ranks, so counting replaces any selection of neighbors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from fastirt.errors import first_line
from fastirt.retrieval.counting import (
    DENSE,
    Block,
    add_ahead,
    count_ahead,
    counts,
    exact_similarities,
    in_bounds,
    listed_similarities,
    pair_similarities,
    quanta,
    rounding,
)  # fmt: skip
from fastirt.retrieval.positives import UNRANKED, PositiveRanks, RowLists
from fastirt.retrieval.search import Faiss, TorchProduct, full_precision, make_index

log = logging.getLogger("fastirt")

BLOCK = 512  # queries of a block
BLOCK_VALUES = 2**22  # positives of a block, or the neighbors that are found for it
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
    count = _backend(backend, gallery, None if depth is None else depth + 1 + int(ignored.counts.max()), device, gpus)
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
    if not isinstance(count, _Searching) or depth is None:
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


class _Counting:
    """Counts over the whole gallery, which is spread over the devices."""

    def __init__(self, gallery: Tensor, device: torch.device, gpus: int) -> None:
        on_gpu = device.type == "cuda"
        devices = [torch.device("cuda", i) for i in range(gpus)] if on_gpu and gpus > 1 else [device]
        parts = torch.arange(len(gallery)).tensor_split(len(devices))
        self.parts = [(int(rows[0]), gallery[rows].to(at)) for rows, at in zip(parts, devices) if len(rows)]
        self.block, self.threads = (32 * BLOCK, 1) if on_gpu else (BLOCK, torch.get_num_threads())

    def rounding(self, dim: int) -> float:
        return rounding(dim)

    def __call__(self, block: Block, exact: bool = False) -> Tensor:
        counted = [count_ahead(block.to(part.device), part, start, exact) for start, part in self.parts]
        return torch.stack([ahead.cpu() for ahead in counted]).sum(dim=0)


class _Searching:
    """Counts among the nearest rows that a search finds; the rest is counted over all."""

    def __init__(self, find: Faiss | TorchProduct, gallery: Tensor, k: int, counting: Callable[[], _Counting]) -> None:
        self.find: Optional[Faiss | TorchProduct] = find
        self.gallery, self.k, self.counting = gallery, k, counting
        self.block, self.threads = max(1, min(BLOCK, BLOCK_VALUES // k)), 1

    def rounding(self, dim: int) -> float:
        return rounding(dim)

    def __call__(self, block: Block) -> Tensor:
        if self.find is None:
            return self.counting()(block)
        try:
            values, columns = self.find(block.query, self.k)
        except (RuntimeError, MemoryError) as error:
            if isinstance(self.find, TorchProduct):
                raise
            log.warning("FAISS failed during the search (%s): exact ranks take over", first_line(error))
            self.find = None
            return self.counting()(block)
        ahead, within = counts(values, block.low, block.high)
        valid = block.rows >= 0
        # Equal rows are many where embeddings have collapsed: too many to be compared pair by pair.
        uncounted = within.sum(dim=1) > valid.sum(dim=1) + DENSE
        for queries, places, found in in_bounds(values, block, torch.where(uncounted[:, None], 0, within)):
            add_ahead(ahead, block, queries, places, columns[queries, found], self.gallery)
        if self.k < len(self.gallery):
            last = values[:, -1:]
            ahead[block.high < last] = UNRANKED
            # Rows that were not found may be as similar as the last one that was.
            uncounted |= ((block.high >= last) & (block.low <= last) & valid).any(dim=1)
        if uncounted.any():
            ahead[uncounted] = self.counting()(block.select(uncounted.nonzero().flatten()))
        return ahead


def _backend(
    backend: str, gallery: Tensor, nearest: Optional[int], device: torch.device, gpus: int
) -> _Counting | _Searching:
    counting = functools.cache(lambda: _Counting(gallery, device, gpus))
    k = len(gallery) if nearest is None else min(nearest, len(gallery))
    if backend == "ranks" or (backend == "auto" and device.type != "cuda"):
        return counting()
    find = make_index(gallery, k, backend, device, gpus, "exact ranks by counting")
    return counting() if find is None else _Searching(find, gallery, k, counting)
