"""The rank of each positive: 1 + the number of gallery rows that are more similar to the query.

Metrics of retrieval are functions of these ranks, so counting replaces any selection of neighbors.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from fastirt.distributed.host_channel import HostChannel
from fastirt.retrieval.counting import Block, exact_similarities, is_ahead, listed_similarities, quanta
from fastirt.retrieval.positives import UNRANKED, PositiveRanks, RowLists, starts_of
from fastirt.retrieval.rank_backends import choose_backend
from fastirt.retrieval.search import full_precision


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
        query: (Q, D), finite; float32 is used.
        gallery: (G, D), likewise.
        positives: gallery rows of each query; those that it ignores are left out.
        ignored: gallery rows that each query's ranking does not contain; None: none.
        backend: "ranks" counts. "faiss" and "torch" find the `depth` nearest rows and count among
            them. "auto" is "faiss" on a GPU up to its limit of k, otherwise "ranks".
        device: where to compute.
        gpus: number of this machine's GPUs over which the gallery is spread.
        depth: ranks above it may be left UNRANKED; None: all are needed.
        progress: show a progress bar.

    Raises:
        ValueError: a vector is not finite, or so long or short that products overflow or vanish;
            an unknown backend.
    """
    device = torch.device(device)
    ignored = RowLists.none(len(query)) if ignored is None else ignored
    positives = positives.without(ignored)
    if not len(positives.rows):
        return PositiveRanks(positives.rows, positives.starts, positives.rows)
    query, gallery = (vectors.detach().to(device, torch.float32) for vectors in (query, gallery))
    quantum, longest = quanta(query, gallery)
    if not torch.isfinite(longest).all():
        raise ValueError("query and gallery: vectors must be finite, and their products neither overflow nor vanish")
    nearest = None if depth is None else depth + 1 + int(ignored.counts.max())
    count = choose_backend(backend, gallery, nearest, device, gpus)
    error = count.rounding(query.shape[1]) * longest

    def ranked(queries: Tensor) -> tuple[Tensor, int]:
        """(place, rank, row) of each positive of B queries, (3, P) int64, and B."""
        at = queries.to(device)
        vectors, step, slack = query[at], quantum[at], error[at, None]
        places, rows = _listed(positives, queries, device)
        valid = places >= 0
        similarity, order = listed_similarities(vectors, gallery, step, rows).sort(dim=1, descending=True, stable=True)
        rows, similarity = rows.gather(1, order), torch.where(valid, similarity, torch.inf)
        bounds = (similarity - slack).float(), (similarity + slack).float()
        ahead = count(Block(vectors, step, similarity, rows, *bounds))
        found = ahead < UNRANKED
        left_out = _listed(ignored, queries, device)[1]
        others = listed_similarities(vectors, gallery, step, left_out)
        for other, row in zip(others.T[:, :, None], left_out.T[:, :, None]):
            ahead -= is_ahead(other, row, similarity, rows).long()
        if count.cuts:
            found &= ahead < (depth or len(gallery))
        ranks = torch.where(found, ahead + 1, UNRANKED)
        return torch.stack([places[valid], ranks[valid], rows[valid]]).cpu(), len(queries)

    ranks, rows = torch.empty_like(positives.rows), torch.empty_like(positives.rows)
    bar = tqdm(total=len(query), desc="ranks", unit="query", disable=None if progress else True, leave=False)
    with bar, full_precision(), threads_over_blocks(count.threads) as run:
        for (where, rank, row), done in run(ranked, _blocks(positives, count.block, count.values)):
            ranks[where], rows[where] = rank, row
            bar.update(done)
    return PositiveRanks(ranks, positives.starts, rows, depth if count.cuts else None)


def shared_ranks(
    host: HostChannel,
    query: Optional[Tensor],
    gallery: Optional[Tensor],
    positives: Optional[RowLists],
    ignored: Optional[RowLists],
    **options: Any,
) -> Optional[PositiveRanks]:
    """As `positive_ranks`, each rank for a part of the queries; a collective call.

    Rank 0 passes the arguments and gets the ranks; the others pass and get None. `options` are
    those of `positive_ranks`, the same on all ranks, but for the device.
    """
    if host.world_size == 1:
        return positive_ranks(query, gallery, positives, ignored, **options)
    query, gallery = host.broadcast(query), host.broadcast(gallery)
    if host.rank == 0 and ignored is None:
        ignored = RowLists.none(len(query))
    positives = RowLists(*(host.broadcast(field) for field in positives or (None, None)))
    ignored = RowLists(*(host.broadcast(field) for field in ignored or (None, None)))
    first, stop = (len(query) * (host.rank + i) // host.world_size for i in range(2))
    own = positive_ranks(query[first:stop], gallery, positives.part(first, stop), ignored.part(first, stop), **options)
    ranks, rows, counts = (host.gather_rows(field) for field in (own.ranks, own.rows, own.counts))
    depths = [depth for depth in host.gather_json(own.depth) if depth is not None]
    return None if ranks is None else PositiveRanks(ranks, starts_of(counts), rows, *depths[:1])


def reference_ranks(
    query: Tensor, gallery: Tensor, positives: RowLists, ignored: Optional[RowLists] = None
) -> PositiveRanks:
    """What `positive_ranks` computes, by sorting all similarities: for tests."""
    ignored = RowLists.none(len(query)) if ignored is None else ignored
    similarity = exact_similarities(query, gallery, quanta(query, gallery)[0])
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return PositiveRanks.of_rankings(order.tolist(), positives.without(ignored), ignored)


def _listed(lists: RowLists, queries: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(places, rows), each (B, R) int64 on `device`: the queries' lists, padded with -1."""
    places = lists.places(queries)
    return places.to(device), torch.where(places >= 0, lists.rows[places], -1).to(device)


def _blocks(positives: RowLists, size: int, values: int) -> Iterator[Tensor]:
    """Queries with positives: those with the most first, so that a block needs little padding, and
    those of one class together."""
    counts = positives.counts
    order = counts.nonzero().flatten()
    order = order[positives.rows[positives.starts[order]].argsort(stable=True)]
    order = order[counts[order].argsort(descending=True, stable=True)]
    while len(order):
        taken = max(1, min(size, values // int(counts[order[0]])))
        yield order[:taken]
        order = order[taken:]


@contextlib.contextmanager
def threads_over_blocks(count: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
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
