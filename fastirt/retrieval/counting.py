"""Counts of the gallery rows ahead of each positive, for a block of queries.

A product in float32 decides all rows but those so near to a positive that rounding could change
their order. These few are compared by `pair_similarities`.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from fastirt.model import onednn_linear

PAIR_VALUES = 2**22  # float64 numbers of the pairs whose similarity is computed at once: 32 MiB
TILE = 2048  # gallery rows whose similarities to a block are held at once
# Above as many positives a query, the similarities of a tile are sorted: a comparison for each
# would take longer. Wider tiles then need fewer binary searches.
SORT_ABOVE, SORTED_TILE = 7, 8192
GPU_TIMES = 8  # as many times wider tiles, and blocks of as many times more queries, on a GPU
# Queries whose positives are computed at once, and how many similarities a product computes in the
# time of one pair by itself.
LISTED, PRODUCT_GAIN = 128, 100
DENSE = 16  # doubtful rows a query and tile, above which float64 decides the whole tile


class Block(NamedTuple):
    """B queries with up to R positives each, by falling similarity; padded.

    Attributes:
        query: (B, D) float32.
        quantum: (B,) float64, of which similarities are multiples.
        similarity: (B, R) float64, of the positives; infinite for padding.
        rows: (B, R) int64, gallery rows of the positives; -1 for padding.
        low: (B, R) float32; a row with a float32 product below it is behind the positive.
        high: (B, R) float32; a row with a float32 product above it is ahead of the positive.
    """

    query: Tensor
    quantum: Tensor
    similarity: Tensor
    rows: Tensor
    low: Tensor
    high: Tensor

    def select(self, queries: Tensor) -> Block:
        """Some of its queries."""
        return Block(*(field[queries] for field in self))

    def within(self, columns: range) -> Tensor:
        """(B, R) bool: whether each positive is one of these gallery rows."""
        return (self.rows >= columns.start) & (self.rows < columns.stop)

    def to(self, device: torch.device) -> Block:
        return Block(*(field.to(device) for field in self))


def rounding(dim: int) -> float:
    """How far a float32 product may be from the similarity, relative to the vectors' lengths.

    Each of D additions rounds by up to 2^-24 of the partial sum, at random: the standard deviation
    of the sum is at most sqrt(D / 3) of that, for partial sums as large as the lengths allow.
    Constant vectors, whose sums round the same way, were seen to reach 4.7 sqrt(D). The
    similarity's own rounding and that of the bounds is added.
    """
    return (6 * dim**0.5 + 2) * 2.0**-24


def quanta(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """(quantum, longest), each (Q,) float64: the step of a query's similarities, and their limit.

    The quantum is a power of two, 2^-24 for vectors of length 1. The limit is not finite if a
    vector is not, or if float32 products may overflow or vanish.
    """
    longest = _lengths(query) * _lengths(gallery).max()
    # 0.9, because the length of a normalized vector may round to more than 1.
    exponent = torch.log2((0.9 * longest).clamp(min=2.0**-200)).ceil()
    usable = (longest < 2.0**120) & ((longest > 2.0**-60) | (longest == 0))
    return torch.exp2(exponent - 24), torch.where(usable, longest, torch.inf)


def _lengths(vectors: Tensor) -> Tensor:
    """(N,) float64, in parts, because torch copies the vectors to float64."""
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in vectors.split(TILE)])


def pair_similarities(query: Tensor, gallery: Tensor, quantum: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The similarity of query rows[p] and gallery row columns[p], (P,) float64.

    The inner product, summed in float64 and rounded to the nearest multiple of the query's quantum:
    the similarity by which ranks are defined.
    """
    chunk = max(1, PAIR_VALUES // query.shape[1])
    parts = [
        (query[row].double() * gallery[column].double()).sum(dim=1).div_(quantum[row]).round_().mul_(quantum[row])
        for row, column in zip(rows.split(chunk), columns.split(chunk))
    ]
    return torch.cat(parts) if parts else quantum.new_empty(0)


def listed_similarities(query: Tensor, gallery: Tensor, quantum: Tensor, rows: Tensor) -> Tensor:
    """Similarities of B queries and (B, R) gallery rows, (B, R) float64; -inf for row -1."""
    similarity = quantum.new_full(rows.shape, -torch.inf)
    for first in range(0, len(rows), LISTED):
        some = slice(first, first + LISTED)
        at, place = (rows[some] >= 0).nonzero(as_tuple=True)
        columns = rows[some][at, place]
        # Queries of one class have the same rows: one product of matrices then serves many pairs.
        distinct, column = columns.unique(return_inverse=True)
        if len(rows[some]) * len(distinct) <= PRODUCT_GAIN * len(columns):
            pairs = exact_similarities(query[some], gallery[distinct], quantum[some])[at, column]
        else:
            pairs = pair_similarities(query[some], gallery, quantum[some], at, columns)
        similarity[some][at, place] = pairs
    return similarity


def products(query: Tensor, gallery: Tensor) -> Tensor:
    """(Q, G) float32: the inner products, by the faster of torch's libraries."""
    if not query.is_cuda and onednn_linear.is_faster():
        return onednn_linear.product(query, gallery)
    return query @ gallery.T


def count_ahead(block: Block, gallery: Tensor, start: int = 0) -> Tensor:
    """(B, R) int64: the rows of a part of the gallery that are ahead of each positive.

    block: on the gallery's device.
    gallery: (G, D) float32, rows `start` to start + G of the whole gallery.
    """
    ahead = torch.zeros_like(block.rows)
    width = SORTED_TILE if block.rows.shape[1] > SORT_ABOVE else TILE
    width *= GPU_TIMES if gallery.is_cuda else 1
    for first in range(0, len(gallery), width):
        tile = gallery[first : first + width]
        columns = range(start + first, start + first + len(tile))
        counted = _count_decided(block, products(block.query, tile), columns, tile)
        ahead += _count_exactly(block, tile, columns) if counted is None else counted
    return ahead


def _count_decided(block: Block, product: Tensor, columns: range, tile: Tensor) -> Optional[Tensor]:
    """As `count_ahead` for one tile, from its float32 product; None if it leaves much in doubt."""
    above, within = counts(product, block.low, block.high)
    doubtful = within - block.within(columns).long()  # each positive is within its own bounds
    if not doubtful.any():
        return above
    if int(doubtful.sum()) > DENSE * len(product) or int(doubtful.min()) < 0:
        return None
    for queries, places, column in in_bounds(product, block, doubtful):
        add_ahead(above, block, queries, places, column, tile, columns.start)
    return above


def in_bounds(values: Tensor, block: Block, number: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The (queries, places, columns), each (N,), of the values within the positives' bounds.

    values: (B, C). number: (B, R); a positive is skipped where it is 0.
    """
    query, place = number.nonzero(as_tuple=True)
    chunk = max(1, PAIR_VALUES // values.shape[1])
    for queries, places in zip(query.split(chunk), place.split(chunk)):
        nearby = values[queries]
        low, high = block.low[queries, places, None], block.high[queries, places, None]
        pair, column = ((nearby >= low) & (nearby <= high)).nonzero(as_tuple=True)
        yield queries[pair], places[pair], column


def add_ahead(
    ahead: Tensor, block: Block, queries: Tensor, places: Tensor, columns: Tensor, tile: Tensor, start: int = 0
) -> None:
    """Add to (B, R) counts the rows start + columns that are ahead of the positives at `places`."""
    similarity = pair_similarities(block.query, tile, block.quantum, queries, columns)
    positive, row = block.similarity[queries, places], block.rows[queries, places]
    counted = is_ahead(similarity, columns + start, positive, row).to(ahead.dtype)
    ahead.index_put_((queries, places), counted, accumulate=True)


def is_ahead(similarity: Tensor, row: Tensor, positive: Tensor, positive_row: Tensor) -> Tensor:
    """Whether gallery rows are ahead of positives, by similarity and then by row; all broadcast."""
    return (similarity > positive) | ((similarity == positive) & (row < positive_row))


def _count_exactly(block: Block, tile: Tensor, columns: range) -> Tensor:
    """As `count_ahead` for one tile, from the product in float64."""
    similarity = exact_similarities(block.query, tile, block.quantum)
    above, equal = counts(similarity, block.similarity, block.similarity)
    ahead = above + torch.where(block.rows >= columns.stop, equal, 0)
    # Of the rows that are as similar as a positive of this tile, those before it are ahead.
    query, place = (block.within(columns) & (equal > 1)).nonzero(as_tuple=True)  # a positive is as similar as itself
    for queries, places in zip(query.split(TILE), place.split(TILE)):
        before = torch.arange(columns.start, columns.stop, device=tile.device) < block.rows[queries, places, None]
        tied = (similarity[queries] == block.similarity[queries, places, None]) & before
        ahead[queries, places] += tied.sum(dim=1)
    return ahead


def exact_similarities(query: Tensor, gallery: Tensor, quantum: Tensor) -> Tensor:
    """(Q, G) float64, as `pair_similarities` of all pairs.

    A matrix product may sum equal rows in different orders: where that could decide a rounding, the
    pair is computed by itself.
    """
    product = (query.double() @ gallery.double().T).div_(quantum[:, None])
    similarity = product.round()
    unsure = (product - similarity).abs_() > 0.5 - query.shape[1] * 2.0**-28
    rows, columns = unsure.nonzero(as_tuple=True)
    similarity.mul_(quantum[:, None])
    similarity[rows, columns] = pair_similarities(query, gallery, quantum, rows, columns)
    return similarity


def counts(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's values are above `high`, and how many in [low, high].

    values: (B, C). low, high: (B, R), of the same dtype. Returns two (B, R) int64.
    """
    size = values.shape[1]
    if low.shape[1] > SORT_ABOVE:
        # numpy sorts ten times as fast as torch, which also returns the order.
        rising = torch.from_numpy(np.sort(values.numpy(), axis=1)) if not values.is_cuda else values.sort(dim=1).values
        upto_high = torch.searchsorted(rising, high, right=True)
        return size - upto_high, upto_high - torch.searchsorted(rising, low)
    # Comparisons to floats and their sum, because those of bool are not vectorized.
    buffer = torch.empty_like(values)
    at_least = torch.stack([torch.ge(values, low[:, r, None], out=buffer).sum(1) for r in range(low.shape[1])], 1)
    above = torch.zeros_like(at_least)
    for r in range(low.shape[1]):
        # Few rows of a tile have anything above the best positives of a trained model.
        rows = at_least[:, r].nonzero().flatten()
        if len(rows) * 4 < len(values):
            above[rows, r] = (values[rows] > high[rows, r, None]).sum(1).to(above.dtype)
        else:
            above[:, r] = torch.gt(values, high[:, r, None], out=buffer).sum(1)
    return above.long(), (at_least - above).long()
