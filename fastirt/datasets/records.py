"""What a data set is to the rest of the program: named splits of (path, label)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Iterable, Mapping, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images with their classes, in catalogue order (which also decides ties in retrieval)."""

    name: str  # "train", "test", "val", "query" or "gallery"
    paths: tuple[str, ...]  # absolute file names
    labels: np.ndarray  # (N,) int64, ids into Catalog.class_names

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Catalog:
    """A data set: one split to train on, and queries to find in a gallery."""

    dataset: str
    root: str  # absolute folder
    train: Split | None  # None: nothing to train on, which only an evaluation can use
    query: Split | None  # None: nothing to evaluate on; training then goes without
    gallery: Split | None  # None: the query split is its own gallery, and a query never finds itself
    class_names: tuple[str, ...]
    # (Q,) int64 gallery row that holds a query's own file, -1: none; None: no query has one
    own: np.ndarray | None = None
    source: str = ""  # absolute name of the CSV file that lists the images; "": they were found in folders

    @property
    def place(self) -> str:
        """What a message about the data set names: its CSV file or its folder."""
        return self.source or self.root

    def splits(self) -> tuple[Split, ...]:
        """The splits that are there: train, query (or test), gallery."""
        return tuple(split for split in (self.train, self.query, self.gallery) if split is not None)


class Image(NamedTuple):
    """One file of a data set of the user's own, before classes have numbers."""

    path: str  # absolute, as the user knows it
    label: str
    real: str  # `path` with every link resolved: equal for two names of one file
    inode: int  # as the folder lists it, equal for hard links; 0: unknown
    row: int = 0  # of the CSV file; 0: found in a folder


@dataclass
class Listed:
    """A data set of the user's own as its folders or its CSV file list it, before it is checked."""

    dataset: str
    root: str
    records: dict[str, list[Image]]  # by split: train, and test or val or query and gallery
    source: str = ""

    @property
    def place(self) -> str:
        """As `Catalog.place`."""
        return self.source or self.root

    def name(self, image: Image) -> str:
        """The image in a message: the row of the CSV file, or the path below the data set's folder."""
        relative = printable(os.path.relpath(image.path, self.root))
        return f"row {image.row} '{relative}'" if image.row else f"'{relative}'"


def printable(text: str) -> str:
    """File names may hold line ends and bytes that are no text: a message must stay one line that can be printed."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, one: str, many: str) -> str:
    """`1 link`, `1,200 links`."""
    return f"{number:,} {one if number == 1 else many}"


def assemble(dataset: str, root: str, records: Mapping[str, Iterable[tuple]], source: str = "") -> Catalog:
    """A catalogue from (absolute path, class name, …) rows per split; class ids in order of first appearance.

    `records` has any of the keys train, test, val, query and gallery; at most one of test, val and query.
    """
    ids: dict[str, int] = {}
    splits = {}
    for name in ("train", "test", "val", "query", "gallery"):
        if name in records:
            rows = list(records[name])
            labels = np.array([ids.setdefault(row[1], len(ids)) for row in rows], dtype=np.int64)
            splits[name] = Split(name, tuple(row[0] for row in rows), labels)
    query = splits.get("test") or splits.get("val") or splits.get("query")
    return Catalog(dataset, root, splits.get("train"), query, splits.get("gallery"), tuple(ids), source=source)
