"""Similarities of rows and columns in tiles that stay in a CPU's cache, and what they add up to.

Few pairs cost: the positives, and the negatives above the margin. A tile is therefore searched for
them, and the columns of each row's pairs are added up, which takes less time than the product with
a matrix of weights as long as at most a third of all pairs cost. Other tiles, and those so small
that the number of operators decides, are summed by masks and that product.

Products are in float32, also under autocast, which leaves operators with `out` alone. Threads share
each tile. A row's pairs are added in the order of their columns, so that the bits are the same
every time.
"""

from __future__ import annotations

import math
from typing import Iterator, NamedTuple, Optional

import torch
from torch import Tensor

from fastirt.kernels.reference import PAIR_THRESHOLD, PairOptions

TILE = 1 << 19  # similarities in a tile: 2 MiB, in the second-level caches of two cores
ROWS = 256  # at most, in a tile
COLUMNS = 2048  # at most, in a tile
SMALL = 1 << 13  # similarities in a tile that is always summed by products
DENSE = 0.25  # share of a tile's pairs above which they are summed by a product


class Tile(NamedTuple):
    """Similarities of n rows from `row` and t columns from `col`. The next tile overwrites it."""

    row: int
    col: int
    similarity: Tensor  # (n, t) float32
    columns: Tensor  # (t, D) float32
    same: Tensor  # (n, t) bool, to work in
    active: Tensor  # (n, t) bool, to work in

    def of_rows(self, values: Tensor) -> Tensor:
        """A view of values (N, ...) at the tile's rows."""
        return _part(values, self.row, self.similarity.shape[0])

    def of_cols(self, values: Tensor) -> Tensor:
        """A view of values (M, ...) at the tile's columns."""
        return _part(values, self.col, self.similarity.shape[1])

    def diagonal(self, values: Tensor, offset: int) -> Optional[Tensor]:
        """A view of values (n, t) where row i meets column i + offset; None if it never does."""
        n, t = self.similarity.shape
        offset += self.row - self.col
        return values.diagonal(offset) if -n < offset < t else None


def _part(values: Tensor, start: int, count: int) -> Tensor:
    """values[start : start + count], without an operator if that is all."""
    return values if count >= values.shape[0] else values[start : start + count]


def has_padding(labels: Tensor) -> bool:
    """Whether a label is negative."""
    return labels.numel() > 0 and int(labels.min()) < 0


def valid_vectors(vectors: Tensor, labels: Tensor, padding: bool) -> Tensor:
    """vectors (N, D) in float32; zeros where the label is negative, if there is such `padding`."""
    return torch.where((labels >= 0)[:, None], vectors.float(), 0.0) if padding else vectors.float()


def tiles(rows: Tensor, cols: Tensor, col_labels: Tensor, masked: bool) -> Iterator[Tile]:
    """All tiles; those of the same columns follow each other.

    rows: (N, D) float32, finite where padding is.
    cols: (M, D) of any float dtype, cast tile by tile.
    col_labels: (M,). masked: columns with a negative label are zeros in their tile.
    """
    count, total = rows.shape[0], cols.shape[0]
    if count == 0 or total == 0:
        return
    height = min(count, ROWS)
    width = min(total, COLUMNS, max(ROWS, TILE // height))
    similarity = torch.empty(height * width, dtype=torch.float32)
    same, active = (torch.empty(height * width, dtype=torch.bool) for _ in range(2))
    for col in range(0, total, width):
        columns = valid_vectors(_part(cols, col, width), _part(col_labels, col, width), masked).contiguous()
        for row in range(0, count, height):
            block = _part(rows, row, height)
            n, t = block.shape[0], columns.shape[0]
            own, *masks = (_part(buffer, 0, n * t).view(n, t) for buffer in (similarity, same, active))
            yield Tile(row, col, torch.mm(block, columns.T, out=own), columns, *masks)


class PairTotals:
    """Of the pairs that cost in all tiles given to `add`, as `reference.pair_loss` defines them.

    own: row i is column i + own, or own[i] of (N,) int64 (-1: none), which is no pair; None: all
        are pairs.
    padding: whether a label of a row or column may be negative.
    sums: [of 1 - s over positives, of s - margin over negatives]; at least the first is NaN if a
        similarity is not finite.
    counts: [positives, negatives].
    columns: the sum of each row's positive columns and of its negative ones, (N, D) float32; None
        where there are none, or without `gradient`.
    """

    def __init__(
        self, row_labels: Tensor, col_labels: Tensor, own: int | Tensor | None, options: PairOptions, padding: bool,
        gradient: bool = True,
    ) -> None:  # fmt: skip
        self.row_labels, self.col_labels, self.own, self.padding = row_labels, col_labels, own, padding
        self.options, self.gradient = options, gradient
        self.sums, self.counts = [0.0, 0.0], [0, 0]
        self.columns: list[Optional[Tensor]] = [None, None]

    def add(self, tile: Tile) -> None:
        same, active = tile.same, tile.active
        torch.eq(tile.of_rows(self.row_labels).unsqueeze(1), tile.of_cols(self.col_labels), out=same)
        if active.numel() <= SMALL:
            return self._add_many(tile, same)
        if not math.isfinite(tile.similarity.sum()):
            self.sums[0] = math.nan
        torch.gt(tile.similarity, self.options.margin, out=active).logical_or_(same)
        self._exclude(tile, active)
        if int(torch.count_nonzero(active)) <= DENSE * active.numel():
            self._add_few(tile, same, active)
        else:
            self._add_many(tile, same)

    def _exclude(self, tile: Tile, pairs: Tensor) -> None:
        """Clear what is no pair in the mask `pairs` (n, t)."""
        if self.padding:
            pairs.logical_and_(tile.of_rows(self.row_labels).ge(0).unsqueeze(1))
            pairs.logical_and_(tile.of_cols(self.col_labels) >= 0)
        if isinstance(self.own, Tensor):
            col = tile.of_rows(self.own) - tile.col
            place = torch.arange(0, pairs.numel(), pairs.shape[1]) + col
            pairs.view(-1).index_fill_(0, place[(col >= 0).logical_and_(col < pairs.shape[1])], False)
        elif self.own is not None and (diagonal := tile.diagonal(pairs, self.own)) is not None:
            diagonal.fill_(False)

    def _add_few(self, tile: Tile, same: Tensor, active: Tensor) -> None:
        """By a list of the pairs in `active`, which has all that cost."""
        places = active.view(-1).nonzero().view(-1)  # by row, then by column
        same = same.view(-1).index_select(0, places)
        loss, costs = self._losses(tile.similarity.view(-1).index_select(0, places), same)
        positive = costs & same
        for sign, chosen in enumerate((positive, costs.logical_xor_(positive))):
            picks = places.masked_select(chosen)
            if picks.numel():
                part = loss.masked_select(chosen).sum(dtype=torch.float64)
                self._count(sign, picks.numel(), float(part))
                self._add_columns(sign, tile, picks)

    def _add_many(self, tile: Tile, same: Tensor) -> None:
        """By masks over the tile."""
        loss, costs = self._losses(tile.similarity, same)
        self._exclude(tile, costs)
        weights = costs.float()
        # Counts are exact in float32 up to 2^24. The sum is NaN if a similarity is.
        count, total = int(weights.sum()), float(loss.mul_(weights).sum(dtype=torch.float64))
        positives = weights * same
        pulls = int(positives.sum())
        part = total if pulls == count else float((loss * positives).sum(dtype=torch.float64))
        self._count(0, pulls, part if math.isfinite(total) else math.nan)
        self._count(1, count - pulls, total - part)
        if pulls:
            self._add_weighted(0, tile, positives, pulls)
        if count > pulls:
            self._add_weighted(1, tile, weights.sub_(positives), count - pulls)

    def _add_weighted(self, sign: int, tile: Tile, weights: Tensor, count: int) -> None:
        """weights (n, t) float32: 1 at `count` pairs, else 0."""
        if not self.gradient:
            return
        if count <= DENSE * weights.numel() and weights.numel() > SMALL:
            self._add_columns(sign, tile, weights.view(-1).nonzero().view(-1))
        else:
            sums = weights.new_empty(len(weights), tile.columns.shape[1])
            self._add_sums(sign, tile, torch.mm(weights, tile.columns, out=sums))

    def _losses(self, similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of each pair, whether it costs); same: whether it is a positive."""
        loss = torch.where(same, 1 - similarity, similarity - self.options.margin)
        if self.options.nonzero:
            return loss, loss > PAIR_THRESHOLD
        return loss, (loss > 0).logical_or_(same)

    def _count(self, sign: int, count: int, loss: float) -> None:
        self.counts[sign] += count
        self.sums[sign] += loss

    def _add_columns(self, sign: int, tile: Tile, places: Tensor) -> None:
        """places: of pairs in the flat tile, ascending."""
        if self.gradient:
            n, t = tile.similarity.shape
            starts = torch.searchsorted(places, torch.arange(0, n * t + 1, t))
            bags = torch.embedding_bag(tile.columns, places.remainder_(t), starts, include_last_offset=True)
            self._add_sums(sign, tile, bags[0])

    def _add_sums(self, sign: int, tile: Tile, sums: Tensor) -> None:
        columns, count = self.columns[sign], len(self.row_labels)
        if columns is None and len(sums) == count:
            self.columns[sign] = sums
            return
        if columns is None:
            columns = self.columns[sign] = sums.new_zeros(count, sums.shape[1])
        tile.of_rows(columns).add_(sums)


class Nearest:
    """Each row's column of highest similarity in all tiles given to `add`, which it overwrites.

    Row i is column i + row_offset, which is no candidate. Nor are columns with a negative label,
    which there may be with `padding`. Of equal columns the lowest index.
    """

    def __init__(self, count: int, col_labels: Tensor, row_offset: int, padding: bool) -> None:
        self.padding = col_labels < 0 if padding else None
        self.row_offset = row_offset
        self.best = torch.empty(count, dtype=torch.float32)
        self.column = torch.empty(count, dtype=torch.int64)

    def add(self, tile: Tile) -> None:
        if self.padding is not None:
            tile.similarity.masked_fill_(tile.of_cols(self.padding), -math.inf)
        if (diagonal := tile.diagonal(tile.similarity, self.row_offset)) is not None:
            diagonal.fill_(-math.inf)
        best, index = tile.of_rows(self.best), tile.of_rows(self.column)
        if tile.col == 0:
            torch.max(tile.similarity, dim=1, out=(best, index))
            return
        value, column = tile.similarity.max(dim=1)
        better = (value > best).logical_or_(value.isnan() & ~best.isnan())
        best.copy_(torch.where(better, value, best))
        index.copy_(torch.where(better, column.add_(tile.col), index))

    def index(self, row_labels: Tensor) -> Tensor:
        """(N,) int64: -1 for padding and for a row without a candidate."""
        return self.column.masked_fill((self.best == -math.inf).logical_or_(row_labels < 0), -1)
