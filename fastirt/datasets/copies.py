"""Byte-identical copies within the evaluation splits, or between them and the training split."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Hashable, Iterable, Iterator

from fastirt.datasets.records import Catalog, counted, printable

THREADS = 8
PART = 4096  # bytes from the middle of a file, where compressed images of one size differ
CHUNK = 2**20
BATCH = 256  # files that a thread takes at once


def warn_of_copies(catalog: Catalog) -> int:
    """Number of harmful byte-identical copies; one warning gives the number and two examples.

    Counts evaluation images that are copies of another evaluation or training image, and training
    images that are copies of one of another class. Links to one file are reported by
    `check_files` instead. Only files of equal size are opened, and only those that also agree in a
    part of their bytes are read whole. Unreadable files are left to the loader.
    """
    evaluated = {path for split in (catalog.query, catalog.gallery) if split is not None for path in split.paths}
    trained = set(catalog.train.paths) if catalog.train is not None else set()
    label = {path: label for split in catalog.splits() for path, label in zip(split.paths, split.labels)}
    with ThreadPoolExecutor(THREADS) as pool:
        groups: Iterable[list[str]] = [sorted(evaluated | trained)]
        for key in (_size, _part, _checksum):
            groups = list(_split(groups, key, lambda part: _matters(part, evaluated, label), pool))
    copies: list[tuple[str, str]] = []
    for group in groups:
        group = _files(group, evaluated)
        originals = [path for path in group if path in trained and path not in evaluated] or group[:1]
        first = originals[0]
        copies += [(p, first) for p in group if p != first and (p in evaluated or label[p] != label[first])]
    agree = [label[path] == label[original] for path, original in copies]
    _warn(catalog, [pair for pair, same in zip(copies, agree) if same], "which inflates the metrics")
    _warn(
        catalog,
        [pair for pair, same in zip(copies, agree) if not same],
        "which is of another class: one of the two labels is wrong",
    )
    return len(copies)


def _warn(catalog: Catalog, copies: list[tuple[str, str]], consequence: str) -> None:
    """Logs the (path, original) pairs."""
    if not copies:
        return
    named = "; ".join(
        f"{_name(path, catalog.root)} is a copy of {_name(original, catalog.root)}" for path, original in copies[:2]
    )
    logging.getLogger("fastirt").warning(
        f"{catalog.place}: {counted(len(copies), 'image is a byte-identical copy', 'images are byte-identical copies')}"
        f" of another, {consequence}: {named}"
    )


def _files(group: list[str], evaluated: set[str]) -> list[str]:
    """One path per file, preferably of an evaluation split."""
    names: dict[Hashable, str] = {}
    for path in sorted(group, key=lambda path: path not in evaluated):
        try:
            status = os.stat(path)
        except OSError:
            continue
        names.setdefault((status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path), path)
    return sorted(names.values())


def _split(
    groups: Iterable[list[str]],
    key: Callable[[str], Hashable],
    matters: Callable[[list[str]], bool],
    pool: ThreadPoolExecutor,
) -> Iterator[list[str]]:
    """The groups divided by `key`: the parts that matter and have at least two files."""
    groups = list(groups)
    paths = [path for group in groups for path in group]
    parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    results = pool.map(lambda part: [key(path) for path in part], parts)
    keys = dict(zip(paths, (value for values in results for value in values)))
    for group in groups:
        divided: dict[Hashable, list[str]] = defaultdict(list)
        for path in group:
            if keys[path] is not None:
                divided[keys[path]].append(path)
        for part in divided.values():
            if len(part) > 1 and matters(part):
                yield part


def _matters(part: list[str], evaluated: set[str], label: dict[str, int]) -> bool:
    """Whether copies change a metric: those among training images of one class do not."""
    return not evaluated.isdisjoint(part) or len({label[path] for path in part}) > 1


def _size(path: str) -> int | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size else None


def _part(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(max(0, (os.fstat(file.fileno()).st_size - PART) // 2))
            return hashlib.blake2b(file.read(PART), digest_size=16).digest()
    except OSError:
        return None


def _checksum(path: str) -> bytes | None:
    digest = hashlib.blake2b(digest_size=32)
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.digest()


def _name(path: str, root: str) -> str:
    return printable(os.path.relpath(path, root))
