"""What a data set is to the rest of the program: named splits of (path, label)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping

import numpy as np


@dataclass(frozen=True)
class Split:
    """Pictures with their classes, in catalogue order (which also decides ties in retrieval)."""

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
    own: np.ndarray | None = None  # (Q,) int64 gallery row that holds a query's own file, -1: none; None: no query has one

    def splits(self) -> tuple[Split, ...]:
        """The splits that are there: train, query (or test), gallery."""
        return tuple(split for split in (self.train, self.query, self.gallery) if split is not None)


def assemble(dataset: str, root: str, records: Mapping[str, Iterable[tuple[str, str]]]) -> Catalog:
    """A catalogue from (absolute path, class name) pairs per split; class ids in order of first appearance.

    `records` has the keys train and test, or train, query and gallery.
    """
    ids: dict[str, int] = {}
    splits = {}
    for name in ("train", "test", "query", "gallery"):
        if name in records:
            rows = list(records[name])
            labels = np.array([ids.setdefault(label, len(ids)) for _, label in rows], dtype=np.int64)
            splits[name] = Split(name, tuple(path for path, _ in rows), labels)
    query = splits["test"] if "test" in splits else splits["query"]
    return Catalog(dataset, root, splits["train"], query, splits.get("gallery"), tuple(ids))
