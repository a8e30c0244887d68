"""Images of a run on a page: thumbnails with class, similarity, and whether they are right."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from fastirt.datasets.records import printable
from fastirt.pages.report.embedded_run import EmbeddedRun
from fastirt.pages.report.neighbors import Neighbors
from fastirt.pages.thumbnails import Thumbnail, Thumbnails

SIDES = (112, 80, 56)  # pixels of thumbnails: the first whose images stay within WEIGHT
WEIGHT = 6_000_000  # characters of all thumbnails on the page


@dataclass(frozen=True)
class Tile:
    """An image of the query split (`of_query`) or gallery split.

    kind: "query", "hit", "miss" or "plain".
    """

    album: Album
    of_query: bool
    row: int  # of the split
    kind: str
    label: str
    name: str
    caption: str = ""

    @property
    def image(self) -> Thumbnail:
        return self.album.thumbnails[0 if self.of_query else 1][self.row]

    @property
    def alt(self) -> str:
        what = {"query": "query", "hit": "right", "miss": "wrong", "plain": "image"}[self.kind]
        return ", ".join(text for text in (f"{what}: {self.label}", self.caption, self.name) if text)


class Row(NamedTuple):
    """A query with its neighbors, and its first right image if that is not among them (or none).

    rank: of the first right image; 0 for a query without one.
    """

    query: Tile
    neighbors: list[Tile]
    right: list[Tile]
    rank: int
    others: int  # images that the query is compared with


class Album:
    """Makes the tiles of a run, and at the end their thumbnails: only those that are shown."""

    def __init__(self, run: EmbeddedRun, found: Neighbors) -> None:
        self.run, self.found = run, found
        self.splits = run.catalog.query, run.catalog.gallery or run.catalog.query
        self.same_split = run.catalog.gallery is None
        self._used: list[tuple[int, int]] = []
        self._make(SIDES[0])

    def _make(self, side: int) -> None:
        orientation = self.run.config.input.orientation
        query, gallery = (Thumbnails(source, side, orientation) for source in self.run.sources)
        self.thumbnails = query, query if self.same_split else gallery

    def query(self, query: int, kind: str = "query") -> Tile:
        """query: of the sample."""
        return self._tile(0, int(self.run.query.rows[self.found.queries[query]]), kind, "")

    def gallery(self, row: int, kind: str = "plain", caption: str = "") -> Tile:
        """row: of the gallery's embeddings."""
        return self._tile(1, int(self.run.gallery.rows[row]), kind, caption)

    def neighbor(self, query: int, place: int) -> Tile:
        """The neighbor of a query, from place 0, framed as right or wrong."""
        hit = bool(self.found.hits[query, place])
        caption = similarity_text(self.found.similarity[query, place])
        return self.gallery(int(self.found.rows[query, place]), "hit" if hit else "miss", caption)

    def row(self, query: int, most: int) -> Row:
        """A query with its `most` nearest images; one less where the first right one follows."""
        found, right = self.found, []
        rank = int(found.first_rank[query]) if found.counted[query] else 0
        if rank > most:
            most -= 1
            caption = similarity_text(found.first_similarity[query])
            right = [self.gallery(int(found.first_row[query]), "hit", caption)]
        neighbors = [self.neighbor(query, place) for place in range(min(most, found.rows.shape[1]))]
        others = len(found.gallery_labels) - int(self.run.exclude[found.queries[query]] >= 0)
        return Row(self.query(query), neighbors, right, rank, others)

    def text(self, query: int) -> tuple[str, ...]:
        """(file, class, rank of the first right image, class, cosine and file of the nearest)."""
        nearest = int(self.found.rows[query, 0])
        rank = self.found.first_rank[query]
        return (
            self.name_of_query(query),
            self.label(int(self.found.query_labels[query])),
            f"{int(rank):,}" if self.found.counted[query] else "",
            self.label(int(self.found.gallery_labels[nearest])),
            similarity_text(self.found.similarity[query, 0]),
            self._name(self.splits[1].paths[int(self.run.gallery.rows[nearest])]),
        )

    def label(self, label: int) -> str:
        return self.run.catalog.class_names[label]

    def name_of_query(self, query: int) -> str:
        """The query's file below the data set's folder."""
        return self._name(self.splits[0].paths[int(self.run.query.rows[self.found.queries[query]])])

    def prepare(self) -> None:
        """Make the thumbnails of all tiles made so far; smaller ones where they weigh too much."""
        for side in SIDES:
            self._make(side)
            for split, thumbnails in enumerate(self.thumbnails):
                thumbnails.prepare(row for of, row in self._used if of == split)
            if sum(len(self.thumbnails[of][row].uri) for of, row in self._used) <= WEIGHT:
                break

    @property
    def images(self) -> int:
        """Number of tiles made so far."""
        return len(self._used)

    def _tile(self, split: int, row: int, kind: str, caption: str) -> Tile:
        self._used.append((split, row))
        label = self.label(self.splits[split].labels[row])
        return Tile(self, split == 0, row, kind, label, self._name(self.splits[split].paths[row]), caption)

    def _name(self, path: str) -> str:
        return printable(os.path.relpath(path, self.run.catalog.root))


def similarity_text(value: float) -> str:
    """A cosine with two decimals, more where it would round up to 1."""
    return f"{value:.4f}" if 0.995 <= value < 0.99995 else f"{value:.2f}"
