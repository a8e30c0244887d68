"""A data set as the rest of the program sees it: named splits of (path, label)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Iterable, Mapping, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images with their classes, in catalogue order; retrieval breaks ties by this order."""

    name: str  # "train", "test", "val", "query" or "gallery"
    paths: tuple[str, ...]  # absolute file names
    labels: np.ndarray  # (N,) int64, ids into Catalog.class_names

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Catalog:
    """A data set: a training split, and queries that are searched in a gallery."""

    dataset: str
    root: str  # absolute folder
    train: Split | None  # None: can only be evaluated
    query: Split | None  # None: evaluation is skipped
    # None: the query split is the gallery, and a query is excluded from its own neighbors
    gallery: Split | None
    class_names: tuple[str, ...]
    # (Q,) int64 gallery row of each query's own file, -1: none; None: no query has one
    own: np.ndarray | None = None
    source: str = ""  # absolute name of the CSV file; "": a data set of class folders

    @property
    def place(self) -> str:
        """The CSV file or folder, to name the data set in messages."""
        return self.source or self.root

    def splits(self) -> tuple[Split, ...]:
        """The existing splits, in the order train, query (or test), gallery."""
        return tuple(split for split in (self.train, self.query, self.gallery) if split is not None)


class Image(NamedTuple):
    """One file of a user's data set, before classes have numbers."""

    path: str  # absolute, links not resolved
    label: str
    real: str  # `path` with every link resolved: equal for two names of one file
    inode: int  # from the folder's listing, equal for hard links; 0: unknown
    row: int = 0  # row of the CSV file; 0: no CSV file


@dataclass
class Listed:
    """A user's data set as listed by its folders or its CSV file, before it is checked."""

    dataset: str
    root: str
    records: dict[str, list[Image]]  # by split: train, and test or val or query and gallery
    source: str = ""

    @property
    def place(self) -> str:
        """As `Catalog.place`."""
        return self.source or self.root

    def name(self, image: Image) -> str:
        """Name of the image in messages: its CSV row, or its path below the data set's folder."""
        relative = printable(os.path.relpath(image.path, self.root))
        return f"row {image.row} '{relative}'" if image.row else f"'{relative}'"


def printable(text: str) -> str:
    """`text` on one printable line: file names may hold line ends and undecodable bytes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def valid_utf8(text: str) -> str:
    """`text` as it is, but for undecodable bytes of file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def counted(number: int, one: str, many: str) -> str:
    """`1 link`, `1,200 links`."""
    return f"{number:,} {one if number == 1 else many}"


def assemble(dataset: str, root: str, records: Mapping[str, Iterable[tuple]], source: str = "") -> Catalog:
    """A catalogue from (absolute path, class name, …) rows per split.

    Class ids follow the order of first appearance. `records` has any of the keys train, test, val,
    query and gallery, but at most one of test, val and query.
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
