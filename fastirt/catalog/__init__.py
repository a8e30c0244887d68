"""Data sets on disk to records (path, label, split), checked before anything is trained on them."""

from __future__ import annotations

import logging
from typing import Iterable

import numpy as np

from fastirt.catalog.own import load_csv, load_demo, load_folder
from fastirt.catalog.published import load_cub200, load_inshop, load_sop
from fastirt.catalog.records import Catalog, Split
from fastirt.errors import UserError

__all__ = ["Catalog", "Split", "check_ranks", "load_catalog", "unmatched_queries"]

LOADERS = {
    "cub200": load_cub200,
    "sop": load_sop,
    "inshop": load_inshop,
    "folder": load_folder,
    "csv": load_csv,
    "demo": load_demo,
}


def load_catalog(dataset: str, data_path: str) -> Catalog:
    """The data set's pictures and classes; every picture it names is there.

    Raises UserError (file, row, remedy) on a missing folder, list or picture, a malformed list, an empty split, or
    when no query has a match. Warns of counts that are not the published ones and of queries without a match.
    """
    if dataset not in LOADERS:
        raise UserError(f"--dataset {dataset}: unknown: use one of {', '.join(LOADERS)}")
    catalog = LOADERS[dataset](data_path)
    lonely = unmatched_queries(catalog)
    if lonely.any():
        first = catalog.query.paths[int(np.argmax(lonely))]
        gallery = catalog.gallery or catalog.query
        if lonely.all():
            raise UserError(
                f"{catalog.root}: no {catalog.query.name} picture has another of its class in the "
                f"{gallery.name} split: at least 2 pictures of a class are needed to measure retrieval"
            )
        logging.getLogger("fastirt").warning(
            f"{catalog.root}: {int(lonely.sum()):,} of {len(catalog.query):,} queries have no match in the "
            f"{gallery.name} split and are left out of the count; the first is {first}"
        )
    return catalog


def unmatched_queries(catalog: Catalog) -> np.ndarray:
    """(Q,) bool: queries with no picture of their class in the gallery (beside themselves, if it is the same split)."""
    gallery = (catalog.gallery or catalog.query).labels
    matches = np.bincount(gallery, minlength=len(catalog.class_names))[catalog.query.labels]
    return matches < (2 if catalog.gallery is None else 1)


def check_ranks(catalog: Catalog, ranks: Iterable[int]) -> None:
    """Raises UserError for a K below 1 or above what a query can be compared with."""
    gallery = catalog.gallery or catalog.query
    most = len(gallery) - (1 if catalog.gallery is None else 0)
    for k in ranks:
        if k < 1:
            raise UserError(f"--rank {k}: K must be at least 1")
        if k > most:
            beside = " beside the query" if catalog.gallery is None else ""
            raise UserError(
                f"--rank {k}: the {gallery.name} split under {catalog.root} has only {most:,} "
                f"pictures{beside}: use K of at most {most}"
            )
