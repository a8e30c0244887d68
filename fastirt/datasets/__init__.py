"""Data sets on disk to records (path, label, split), checked before anything is trained on them."""

from __future__ import annotations

import dataclasses
import logging
from typing import Iterable, Sequence

import numpy as np

from fastirt.datasets.class_folders import load_demo, load_folder
from fastirt.datasets.copies import warn_of_copies
from fastirt.datasets.csv_list import load_csv
from fastirt.datasets.cub_sop_inshop import load_cub200, load_inshop, load_sop
from fastirt.datasets.file_identity import check_files
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
    """The data set's images and classes; every image it names is there.

    `training`: a command that trains (True) needs a training split, and goes without a test split where there is none;
    one that evaluates (False) needs a test split alone; one that packs (None) any split. `eval_split`, "test" or "val",
    chooses where a data set has both.

    Raises UserError (file, row, remedy) on a missing folder, list or image, a malformed list, an empty split, too few
    classes, or when no query has a match. Warns of what is left out, of counts that are not the published ones and of
    queries without a match.
    """
    if dataset not in LOADERS:
        raise UserError(f"--dataset {dataset}: unknown: use one of {', '.join(LOADERS)}")
    if dataset in PUBLISHED:
        catalog, listed = PUBLISHED[dataset](data_path), None
    else:
        listed = OWN[dataset](data_path, eval_split, training)
        catalog = _checked(listed, training)
    _check_matches(catalog, listed)
    _check_classes(catalog, training)
    return catalog


def _checked(listed: Listed, training: bool | None) -> Catalog:
    """The catalogue of a listed data set, without what stands there twice."""
    query = next((name for name in ("test", "val", "query") if name in listed.records), None)
    gallery = "gallery" if "gallery" in listed.records else None
    own = check_files(listed, query, gallery, training)
    _check_case(listed)
    return dataclasses.replace(assemble(listed.dataset, listed.root, listed.records, listed.source), own=own)


def _check_case(listed: Listed) -> None:
    """Warns of labels that differ in nothing but their case: most likely one class."""
    labels = dict.fromkeys(image.label for images in listed.records.values() for image in images)
    first: dict[str, str] = {}
    alike = [(first[key], label) for label in labels if first.setdefault(key := label.casefold(), label) != label]
    if alike:
        logging.getLogger("fastirt").warning(
            f"{listed.place}: {counted(len(alike), 'label differs', 'labels differ')} from another in case alone and "
            f"{'is a class of its' if len(alike) == 1 else 'are classes of their'} own: '{alike[0][1]}' beside '{alike[0][0]}'"
        )


def _check_classes(catalog: Catalog, training: bool | None) -> None:
    """Too few classes, which any model gets right; classes of the test split that also train."""
    train, query = catalog.train, catalog.query
    if training and train is not None:
        _require_two(catalog, train, "without a second one there is nothing to tell apart")
    if query is None:
        return
    if training is not None:
        _require_two(catalog, catalog.gallery or query, "every image found is right then")
    if catalog.gallery is not None and len(np.unique(query.labels)) < 2:
        logging.getLogger("fastirt").warning(
            f"{catalog.place}: all {len(query):,} queries are of one class ({catalog.class_names[query.labels[0]]}): the "
            "figures say nothing about other classes"
        )
    known = np.intersect1d(train.labels, query.labels) if train is not None else ()
    if len(known):
        logging.getLogger("fastirt").warning(
            f"{catalog.place}: {len(known):,} of {len(np.unique(query.labels)):,} {query.name} classes are also training "
            "classes: retrieval is usually measured on classes that were not trained on"
        )


def _require_two(catalog: Catalog, split: Split, why: str) -> None:
    if len(np.unique(split.labels)) > 1:
        return
    message = (
        f"{catalog.place}: the {split.name} split has one class only ({catalog.class_names[split.labels[0]]}): {why}"
    )
    if catalog.dataset not in ("folder", "csv"):  # the others are made as they are meant to be
        logging.getLogger("fastirt").warning(message)
    else:
        raise UserError(f"{message}: at least 2 classes are needed")


def _check_matches(catalog: Catalog, listed: Listed | None) -> None:
    """Raises UserError where no query has a match; warns of those that have none."""
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
        f"{gallery.name} split and are left out of the count; the first is {name}"
    )


def unmatched_queries(catalog: Catalog) -> np.ndarray:
    """(Q,) bool: queries with no image of their class in the gallery beside their own file."""
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
    """How many gallery images every query can be compared with; None without a split to evaluate on."""
    gallery = catalog.gallery or catalog.query
    return None if gallery is None else len(gallery) - (catalog.gallery is None or catalog.own is not None)


def reachable_ks(catalog: Catalog, ks: Sequence[int], requested: bool, log: bool = True) -> Sequence[int]:
    """The K of `ks` that the gallery is large enough for.

    requested: the user named them, so one above the gallery is an error; a preset's is left out.
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


def check_recall_ks(catalog: Catalog, ranks: Iterable[int]) -> None:
    """Raises UserError for a K below 1 or above what every query can be compared with."""
    gallery, most = catalog.gallery or catalog.query, reachable(catalog)
    for k in ranks:
        if k < 1:
            raise UserError(f"--rank {k}: K must be at least 1")
        if most is not None and k > most:
            beside = " beside the query" if most < len(gallery) else ""
            where = f"in {catalog.source}" if catalog.source else f"under {catalog.root}"
            raise UserError(
                f"--rank {k}: the {gallery.name} split {where} has only {most:,} images{beside}: use K of at most {most}"
            )
