"""Files listed under several names (links, hard links, aliases), within and between splits."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from typing import Iterable

import numpy as np

from fastirt.datasets.records import Image, Listed, counted
from fastirt.errors import UserError

MAX_AFFECTED = 0.1  # share of the queries above which such files would decide the metrics


def check_files(listed: Listed, query: str | None, gallery: str | None, training: bool | None) -> np.ndarray | None:
    """Removes files repeated within a split from `listed` and returns `Catalog.own`.

    Warns about images with two labels and about evaluation images that are also training images.
    A gallery may legitimately hold training images, such as catalogue photographs of products.

    Raises:
        UserError: more than `MAX_AFFECTED` of the queries are training images, or more than
            that share of queries or gallery has two labels. Packing (`training` None) only warns.
    """
    ids = _file_ids([image for images in listed.records.values() for image in images])
    _drop_repeated(listed, ids)
    queries = listed.records.get(query, []) if query else []
    galleries = listed.records[gallery] if gallery else []
    evaluated = queries + galleries
    labels: dict[int, dict[str, Image]] = defaultdict(dict)
    for images in listed.records.values():
        for image in images:
            labels[ids[image.path]].setdefault(image.label, image)
    every = [image for images in listed.records.values() for image in images]
    doubtful = _unique([image for image in every if len(labels[ids[image.path]]) > 1], ids)
    if doubtful:
        one, other = list(labels[ids[doubtful[0].path]].values())[:2]
        message = (
            f"{listed.place}: {counted(len(doubtful), 'image is', 'images are')} under two labels (the same file): "
            f"{listed.name(one)} is '{one.label}' and {listed.name(other)} is '{other.label}'"
        )
        parts = (("queries", queries), ("gallery images", galleries))
        _report(
            message,
            [(name, [len(labels[ids[i.path]]) > 1 for i in part]) for name, part in parts],
            training,
            "keep one label for each",
        )
    trained = {ids[image.path]: image for image in listed.records.get("train", [])}
    shared = _unique([image for image in evaluated if ids[image.path] in trained], ids)
    if shared:
        message = (
            f"{listed.place}: {counted(len(shared), 'evaluation image is', 'evaluation images are')} in the training "
            f"split too (the same file): {listed.name(shared[0])} is {listed.name(trained[ids[shared[0].path]])}"
        )
        affected = [ids[image.path] in trained for image in queries]
        _report(
            message,
            [("queries", affected)],
            training,
            "remove them from one of the splits (evaluation needs no training split)",
        )
    return _own(listed, ids, queries, listed.records[gallery]) if gallery else None


def _report(message: str, parts: list[tuple[str, list[bool]]], training: bool | None, remedy: str) -> None:
    """Warns, or raises UserError. parts: (name, whether each of its images is affected)."""
    for name, affected in parts:
        number = sum(affected)
        if training is not None and number > MAX_AFFECTED * len(affected):
            raise UserError(f"{message}: {number:,} of {len(affected):,} {name}, too many for a fair metric: {remedy}")
    logging.getLogger("fastirt").warning(message)


def _unique(images: list[Image], ids: dict[str, int]) -> list[Image]:
    """The first image of each file."""
    return list({ids[image.path]: image for image in reversed(images)}.values())[::-1]


def _file_ids(images: list[Image]) -> dict[str, int]:
    """Path -> file number, equal for all names of one file."""
    ids: dict[str, int] = {}
    real = {image.path: ids.setdefault(image.real, len(ids)) for image in images}
    names: dict[int, set[str]] = defaultdict(set)
    for image in images:
        if image.inode:  # some file systems have no inodes
            names[image.inode].add(image.real)
    same: dict[int, int] = {}
    for paths in names.values():
        # Inodes repeat across disks, and a folder's listing may differ from stat: compare by stat.
        if len(paths) > 1:
            first: dict[tuple, int] = {}
            for path in sorted(paths):
                key = _file_key(path)
                if key is not None:
                    same[ids[path]] = first.setdefault(key, ids[path])
    return {path: same.get(number, number) for path, number in real.items()}


def _file_key(path: str) -> tuple | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) if status.st_ino else None


def _drop_repeated(listed: Listed, ids: dict[str, int]) -> None:
    """Keeps one name of each file per split and label, a real file's rather than a link's."""
    for split, images in listed.records.items():
        groups: dict[tuple[int, str], list[Image]] = defaultdict(list)
        for image in images:
            groups[ids[image.path], image.label].append(image)
        repeated = [group for group in groups.values() if len(group) > 1]
        if not repeated:
            continue
        kept = [next((image for image in group if not os.path.islink(image.path)), group[0]) for group in repeated]
        dropped = {image.path for group, one in zip(repeated, kept) for image in group if image.path != one.path}
        listed.records[split] = [image for image in images if image.path not in dropped]
        other = next(image for image in repeated[0] if image.path in dropped)
        logging.getLogger("fastirt").warning(
            f"{listed.place}: {counted(len(dropped), 'link or hard link', 'links or hard links')} to images that the "
            f"{split} split holds already, left out: {listed.name(other)} is {listed.name(kept[0])}"
        )


def _own(listed: Listed, ids: dict[str, int], queries: Iterable[Image], gallery: list[Image]) -> np.ndarray | None:
    """(Q,) gallery row of each query's own file, best with its label, or -1; None: all are -1."""
    rows: dict[int, int] = {}
    labelled: dict[tuple[int, str], int] = {}
    for row, image in enumerate(gallery):
        rows.setdefault(ids[image.path], row)
        labelled.setdefault((ids[image.path], image.label), row)
    own = np.array([labelled.get((ids[i.path], i.label), rows.get(ids[i.path], -1)) for i in queries], dtype=np.int64)
    number = int((own >= 0).sum())
    if not number:
        return None
    logging.getLogger("fastirt").info(
        f"{listed.place}: {number:,} of {len(own):,} queries are in the gallery too (the same file): no "
        "query retrieves its own file"
    )
    return own
