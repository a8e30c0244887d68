"""Byte-identical copies: images that find themselves under another name, or that were trained on."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Hashable, Iterable, Iterator

from fastirt.catalog.records import Catalog, counted, printable

THREADS = 8
PART = 4096  # bytes from the middle of a file, where compressed images of one size differ
CHUNK = 2**20
BATCH = 256  # files that a thread takes at once


def warn_of_copies(catalog: Catalog) -> int:
    """The number of evaluation images that are byte-identical copies of another one, or of a training image.

    Names of one file are no copies. Only files of equal size are opened, and only those that also agree in a part of
    their bytes are read whole. Unreadable files are left to the loader. One warning names the number and two examples.
    """
    evaluated = {path for split in (catalog.query, catalog.gallery) if split is not None for path in split.paths}
    trained = set(catalog.train.paths) if catalog.train is not None else set()
    if not evaluated:
        return 0
    with ThreadPoolExecutor(THREADS) as pool:
        groups: Iterable[list[str]] = [sorted(evaluated | trained)]
        for key in (_size, _part, _checksum):
            groups = list(_split(groups, key, evaluated, pool))
    copies, examples = 0, []
    for group in groups:
        originals = [path for path in group if path in trained and path not in evaluated] or group[:1]
        found = [path for path in group if path in evaluated and path != originals[0]]
        copies += len(found)
        examples += [(path, originals[0]) for path in found]
    if copies:
        named = "; ".join(
            f"{_name(path, catalog.root)} is a copy of {_name(original, catalog.root)}"
            for path, original in examples[:2]
        )
        logging.getLogger("fastirt").warning(
            f"{catalog.place}: {counted(copies, 'picture', 'pictures')} to evaluate on "
            f"{'is a byte-identical copy' if copies == 1 else 'are byte-identical copies'} of another or of a training "
            f"picture, which makes retrieval look better than it is: {named}"
        )
    return copies


def _split(
    groups: Iterable[list[str]], key: Callable[[str], Hashable], evaluated: set[str], pool: ThreadPoolExecutor
) -> Iterator[list[str]]:
    """The groups divided by `key`, without what has no equal among the evaluation images."""
    groups = list(groups)
    paths = [path for group in groups for path in group]
    parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    found = pool.map(lambda part: [key(path) for path in part], parts)
    keys = dict(zip(paths, (value for values in found for value in values)))
    for group in groups:
        divided: dict[Hashable, list[str]] = defaultdict(list)
        for path in group:
            if keys[path] is not None:
                divided[keys[path]].append(path)
        for part in divided.values():
            if len(part) > 1 and not evaluated.isdisjoint(part):
                yield part


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
