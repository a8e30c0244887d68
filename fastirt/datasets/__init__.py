"""Data sets: read from disk as (path, label, split) records and checked before training."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Iterable, Sequence

import numpy as np

from fastirt.config.user_code import is_user_code
from fastirt.config.validate import check_ks
from fastirt.datasets.class_folders import load_demo, load_folder
from fastirt.datasets.copies import warn_of_copies
from fastirt.datasets.csv_list import load_csv
from fastirt.datasets.cub_sop_inshop import load_cub200, load_inshop, load_sop
from fastirt.datasets.file_identity import check_files
from fastirt.datasets.own.python_records import load_own
from fastirt.datasets.records import Catalog, Listed, Split, assemble, counted
from fastirt.errors import UserError

__all__ = [
    "Catalog",
    "Split",
    "check_recall_ks",
    "load_dataset",
    "reachable",
    "reachable_ks",
    "unmatched_queries",
    "warn_of_copies",
]

PUBLISHED = {"cub200": load_cub200, "sop": load_sop, "inshop": load_inshop}
OWN = {"folder": load_folder, "csv": load_csv, "demo": load_demo}
LOADERS = PUBLISHED | OWN


def load_dataset(dataset: str, data_path: str, *, eval_split: str = "test", training: bool | None = True) -> Catalog:
    """Read a data set and check it; every listed image exists.

    Logs a warning for skipped files, image counts that differ from the published ones, and queries
    without a match.

    Args:
        dataset: `cub200`, `sop`, `inshop`, `folder`, `csv` or `demo`; or FILE.py:NAME, a function
            of the user from the path to records (see `own/python_records.py`).
        data_path: folder of the data set, or its CSV file.
        eval_split: "test" or "val", the split to evaluate if the data set has both.
        training: True requires a training split (a missing test split only skips evaluation);
            False requires a test split only; None (packing) accepts any split.

    Returns:
        The splits with absolute paths and labels (N,) int64.

    Raises:
        UserError: a missing folder, list or image, a malformed list, an empty split, too few
            classes, or no query with a match. The message names file, row and remedy.
    """
    if dataset not in LOADERS and not is_user_code(dataset):
        raise UserError(f"--dataset {dataset}: unknown: use one of {', '.join(LOADERS)}, or FILE.py:NAME")
    if dataset in PUBLISHED:
        catalog, listed = PUBLISHED[dataset](data_path), None
    else:
        load = OWN.get(dataset) or partial(load_own, dataset)
        listed = load(data_path, eval_split, training)
        catalog = _checked(listed, training)
    _check_matches(catalog, listed)
    _check_classes(catalog, training)
    return catalog


def _checked(listed: Listed, training: bool | None) -> Catalog:
    """The catalogue of a listed data set, without repeated files."""
    query = next((name for name in ("test", "val", "query") if name in listed.records), None)
    gallery = "gallery" if "gallery" in listed.records else None
    own = check_files(listed, query, gallery, training)
    _check_case(listed)
    return dataclasses.replace(assemble(listed.dataset, listed.root, listed.records, listed.source), own=own)


def _check_case(listed: Listed) -> None:
    """Warns about labels that differ only in case: most likely one class."""
    labels = dict.fromkeys(image.label for images in listed.records.values() for image in images)
    first: dict[str, str] = {}
    alike = [(first[key], label) for label in labels if first.setdefault(key := label.casefold(), label) != label]
    if alike:
        logging.getLogger("fastirt").warning(
            f"{listed.place}: {counted(len(alike), 'label differs', 'labels differ')} from another in case alone, "
            f"which makes separate classes: '{alike[0][1]}' and '{alike[0][0]}'"
        )


def _check_classes(catalog: Catalog, training: bool | None) -> None:
    """Rejects splits with one class; warns about classes that are in training and test split."""
    train, query = catalog.train, catalog.query
    if training and train is not None:
        _require_two(catalog, train, "training needs a second class to tell apart")
    if query is None:
        return
    if training is not None:
        _require_two(catalog, catalog.gallery or query, "every retrieved image would be correct")
    if catalog.gallery is not None and len(np.unique(query.labels)) < 2:
        logging.getLogger("fastirt").warning(
            f"{catalog.place}: all {len(query):,} queries are of one class "
            f"({catalog.class_names[query.labels[0]]}): the metrics say nothing about other classes"
        )
    known = np.intersect1d(train.labels, query.labels) if train is not None else ()
    if len(known):
        logging.getLogger("fastirt").warning(
            f"{catalog.place}: {len(known):,} of {len(np.unique(query.labels)):,} {query.name} classes are also "
            "training classes: retrieval is usually measured on classes unseen in training"
        )


def _require_two(catalog: Catalog, split: Split, reason: str) -> None:
    if len(np.unique(split.labels)) > 1:
        return
    message = (
        f"{catalog.place}: the {split.name} split has one class only ({catalog.class_names[split.labels[0]]}): {reason}"
    )
    # The other data sets have a fixed content that the user did not choose.
    if catalog.dataset in (*PUBLISHED, "demo"):
        logging.getLogger("fastirt").warning(message)
    else:
        raise UserError(f"{message}: at least 2 classes are needed")


def _check_matches(catalog: Catalog, listed: Listed | None) -> None:
    """Raises UserError if no query has a match; warns about the queries without one."""
    lonely = unmatched_queries(catalog)
    if not lonely.any():
        return
    gallery = catalog.gallery or catalog.query
    if lonely.all():
        raise UserError(
            f"{catalog.place}: no {catalog.query.name} image has another of its class in the "
            f"{gallery.name} split: at least 2 images of a class are needed to measure retrieval"
        )
    first = int(np.argmax(lonely))
    name = listed.name(listed.records[catalog.query.name][first]) if catalog.source else catalog.query.paths[first]
    logging.getLogger("fastirt").warning(
        f"{catalog.place}: {int(lonely.sum()):,} of {len(catalog.query):,} queries have no match in the "
        f"{gallery.name} split and are not counted; the first is {name}"
    )


def unmatched_queries(catalog: Catalog) -> np.ndarray:
    """(Q,) bool: queries whose class has no gallery image other than the query's own file."""
    if catalog.query is None:
        return np.zeros(0, dtype=bool)
    gallery = (catalog.gallery or catalog.query).labels
    matches = np.bincount(gallery, minlength=len(catalog.class_names))[catalog.query.labels]
    if catalog.gallery is None:
        return matches < 2
    if catalog.own is not None:
        matches = matches - ((catalog.own >= 0) & (gallery[catalog.own] == catalog.query.labels))
    return matches < 1


def reachable(catalog: Catalog) -> int | None:
    """Number of gallery images each query can be compared with; None without evaluation split."""
    gallery = catalog.gallery or catalog.query
    return None if gallery is None else len(gallery) - (catalog.gallery is None or catalog.own is not None)


def reachable_ks(catalog: Catalog, ks: Sequence[int], requested: bool, log: bool = True) -> Sequence[int]:
    """The K of `ks` that are at most `reachable(catalog)`; others are left out with a warning.

    requested: the user passed `ks`, so a K above is an error. log: whether to warn.
    Raises UserError.
    """
    most = reachable(catalog)
    if requested or most is None or max(ks) <= most:
        check_recall_ks(catalog, ks)
        return ks
    if log:
        logging.getLogger("fastirt").warning(
            "%s: left out Recall@K for K above %d: the gallery has no more images", catalog.place, most
        )
    return tuple(k for k in ks if k <= most) or (1,)


def check_recall_ks(catalog: Catalog, ks: Iterable[int]) -> None:
    """Raises UserError for a K below 1 or above `reachable(catalog)`."""
    gallery, most = catalog.gallery or catalog.query, reachable(catalog)
    if gallery is None or most is None:
        check_ks(ks)
    else:
        place = f"in {catalog.source}" if catalog.source else f"under {catalog.root}"
        check_ks(ks, most, f"the {gallery.name} split {place}", beside_query=most < len(gallery))
