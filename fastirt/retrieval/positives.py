"""Which gallery rows belong to each query, and the ranks that a search gives them."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

UNRANKED = 2**62  # rank of a positive that a cut ranking does not contain


class RowLists(NamedTuple):
    """A list of gallery rows for each of Q queries, stored one after the other.

    Attributes:
        rows: (P,) int64, the lists' gallery rows, ascending within a list.
        starts: (Q + 1,) int64; the list of query i is rows[starts[i] : starts[i + 1]].
    """

    rows: Tensor
    starts: Tensor

    @property
    def counts(self) -> Tensor:
        """(Q,) int64 length of each list."""
        return self.starts.diff()

    @property
    def queries(self) -> Tensor:
        """(P,) int64 query of each row."""
        return torch.arange(len(self.starts) - 1).repeat_interleave(self.counts)

    def places(self, queries: Tensor) -> Tensor:
        """(B, R) int64: where the lists of some queries are in `rows`, padded with -1."""
        counts = self.counts[queries, None]
        place = torch.arange(int(counts.max()) if len(queries) else 0)
        return torch.where(place < counts, self.starts[queries, None] + place, -1)

    def part(self, first: int, stop: int) -> RowLists:
        """The lists of queries `first` to `stop` - 1."""
        starts = self.starts[first : stop + 1]
        return RowLists(self.rows[starts[0] : starts[-1]], starts - starts[0])

    @staticmethod
    def of_lists(lists: Sequence[Sequence[int]]) -> RowLists:
        """From a sequence of gallery rows for each query; doubles count once."""
        lists = [sorted(set(rows)) for rows in lists]
        counts = torch.tensor([len(rows) for rows in lists], dtype=torch.int64)
        rows = torch.tensor([row for rows in lists for row in rows], dtype=torch.int64)
        return RowLists(rows, starts_of(counts))

    @staticmethod
    def of_labels(query_labels: Tensor, gallery_labels: Tensor) -> RowLists:
        """The gallery rows of each query's label. Labels: (Q,) and (G,) int64, not negative."""
        classes = int(torch.cat([query_labels, gallery_labels]).max()) + 1 if len(query_labels) else 0
        sizes = torch.bincount(gallery_labels, minlength=classes)
        by_class = gallery_labels.argsort(stable=True)
        counts = sizes[query_labels]
        starts = starts_of(counts)
        place = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(counts)
        first = (sizes.cumsum(0) - sizes)[query_labels]
        return RowLists(by_class[first.repeat_interleave(counts) + place], starts)

    @staticmethod
    def none(queries: int) -> RowLists:
        """An empty list for each query."""
        return RowLists(torch.empty(0, dtype=torch.int64), torch.zeros(queries + 1, dtype=torch.int64))

    @staticmethod
    def of_column(rows: Tensor) -> RowLists:
        """At most one row for each query: (Q,) int64, -1 for none."""
        return RowLists(rows[rows >= 0], starts_of((rows >= 0).long()))

    def without(self, other: RowLists) -> RowLists:
        """These lists without the rows of the other's list of the same query."""
        if not len(other.rows) or not len(self.rows):
            return self
        queries, longest = self.queries, int(other.counts.max())
        if longest == 1:  # a query's own row: this is much faster than `isin`
            left_out = torch.full((len(self.starts) - 1,), -1).index_put((other.queries,), other.rows)
            keep = self.rows != left_out[queries]
        else:
            bound = int(torch.cat([self.rows, other.rows]).max()) + 1
            keep = ~torch.isin(queries * bound + self.rows, other.queries * bound + other.rows)
        counts = torch.bincount(queries[keep], minlength=len(self.starts) - 1)
        return RowLists(self.rows[keep], starts_of(counts))


class PositiveRanks(NamedTuple):
    """The rank of each positive of each query among the gallery rows that are not ignored.

    Attributes:
        ranks: (P,) int64 from 1, ascending within a query; UNRANKED where a cut ranking ends before
            the positive.
        starts: (Q + 1,) int64; the ranks of query i are ranks[starts[i] : starts[i + 1]].
        rows: (P,) int64, the gallery row that has the rank.
        depth: ranks up to here are known; None: all are.
    """

    ranks: Tensor
    starts: Tensor
    rows: Tensor
    depth: Optional[int] = None

    @property
    def counts(self) -> Tensor:
        """(Q,) int64 number of positives, R."""
        return self.starts.diff()

    @property
    def queries(self) -> Tensor:
        """(P,) int64 query of each rank."""
        return RowLists(self.rows, self.starts).queries

    @staticmethod
    def of_rankings(rankings: Sequence[Sequence[int]], positives: RowLists, ignored: RowLists) -> PositiveRanks:
        """From the gallery rows in the order of their similarity, for each query; may be cut.

        Ignored rows are taken out of the ranking, and everything behind moves up.
        """
        ranks, rows = [], []
        for query, ranking in enumerate(rankings):
            left_out = set(_list(ignored, query))
            place = {row: rank for rank, row in enumerate((row for row in ranking if row not in left_out), 1)}
            found = sorted((place.get(row, UNRANKED), row) for row in _list(positives, query))
            ranks += [rank for rank, _ in found]
            rows += [row for _, row in found]
        return PositiveRanks(
            torch.tensor(ranks, dtype=torch.int64), positives.starts, torch.tensor(rows, dtype=torch.int64)
        )


def starts_of(counts: Tensor) -> Tensor:
    """(Q + 1,) int64, where lists of these lengths start and end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _list(lists: RowLists, query: int) -> list[int]:
    return lists.rows[lists.starts[query] : lists.starts[query + 1]].tolist()
