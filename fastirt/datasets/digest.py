"""Digests of a data set: names, classes and sizes of its images."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Callable

import numpy as np

from fastirt.datasets.records import Catalog, Split


def file_digest(file: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 (hex) of a file's bytes; `advance` is called with the size of each block."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while data := opened.read(2**20):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


def relative_names(catalog: Catalog, split: Split) -> list[str]:
    """The split's paths relative to the data set's folder, with forward slashes."""
    prefix = catalog.root.rstrip(os.sep) + os.sep
    return [
        path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, catalog.root) for path in split.paths
    ]


def catalog_digest(catalog: Catalog) -> str:
    """SHA-256 (hex) over split, relative path and class of every image, not the folder's place."""
    digest = hashlib.sha256()
    classes = [os.fsencode(name) for name in catalog.class_names]
    for split in catalog.splits():
        for name, label in zip(relative_names(catalog, split), split.labels):
            digest.update(b"\0".join((split.name.encode(), os.fsencode(name), classes[label])) + b"\0\n")
    return digest.hexdigest()


def source_stat(path: str) -> tuple[int, int]:
    """(size in bytes, modification time in nanoseconds); (-1, -1) for a missing file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def evaluation_digest(catalog: Catalog) -> str:
    """`catalog_digest` of the evaluation splits alone."""
    return catalog_digest(dataclasses.replace(catalog, train=None))


def sizes_digest(catalog: Catalog) -> str:
    """SHA-256 (hex) over the file sizes of the evaluation splits, to detect replaced images."""
    splits = dataclasses.replace(catalog, train=None).splits()
    sizes = [source_stat(path)[0] for split in splits for path in split.paths]
    return hashlib.sha256(np.array(sizes, "<i8").tobytes()).hexdigest()
