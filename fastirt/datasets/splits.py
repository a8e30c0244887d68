"""Names of splits, and which of those that a data set has are used."""

from __future__ import annotations

import logging
from typing import Iterable

from fastirt.errors import UserError

SYNONYMS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "query": "query",
    "queries": "query",
    "gallery": "gallery",
    "index": "gallery",
    "database": "gallery",
}
SPLITS = tuple(dict.fromkeys(SYNONYMS.values()))
LAYOUT = "train, and test or val, or query and gallery, are the splits that are read"


def split_name(text: str) -> str | None:
    """The split that a folder or a CSV value names, in any case and by any synonym; None for no split."""
    return SYNONYMS.get(text.strip().casefold())


def family(split: str) -> str:
    """What --eval-split calls it: a query and a gallery split together are the test split."""
    return split if split in ("train", "val") else "test"


def choose(parts: Iterable[tuple[str, str]], eval_split: str, training: bool | None, where: str) -> str | None:
    """The family to evaluate on, "test" or "val", of the (family, split) pairs that a data set has; None: there is none.

    Raises UserError where a split that the command needs is missing (`training` as in `load_dataset`), or where
    splits do not belong together. Says which is taken where that is not what was asked for.
    """
    parts = set(parts)
    log = logging.getLogger("fastirt")
    found = ", ".join(name for name in SPLITS if any(split == name for _, split in parts)) or "none"
    there = [name for name in ("test", "val") if any(of == name for of, _ in parts)]
    chosen = eval_split if eval_split in there else (there[0] if there else None)
    _check_family({split for of, split in parts if of == chosen}, found, where)
    trains = ("train", "train") in parts
    if training is True and not trains:
        raise UserError(f"{where}: the split train is missing (found: {found}): {LAYOUT}")
    if training is False and chosen is None:
        raise UserError(f"{where}: the split test is missing (found: {found}): evaluation needs it: {LAYOUT}")
    if training is None and not parts:
        raise UserError(f"{where}: no split is there: {LAYOUT}")
    if len(there) == 2:
        other = "val" if chosen == "test" else "test"
        log.info(f"{where}: evaluation uses the {chosen} split; for the {other} split pass --eval-split {other}")
    elif chosen is not None and chosen != eval_split:
        log.warning(f"{where}: there is no {eval_split} split: evaluation uses the {chosen} split")
    elif chosen is None and training:
        log.warning(f"{where}: no test split: all images of the training split train, and evaluation is skipped")
    return chosen


def _check_family(splits: set[str], found: str, where: str) -> None:
    pair = {"query", "gallery"}
    absent = sorted(pair - splits) if splits & pair else []
    if absent:
        raise UserError(f"{where}: the split {absent[0]} is missing (found: {found}): {LAYOUT}")
    if len(splits) > 1 and splits != pair:
        alone = sorted(splits - pair)[0]
        raise UserError(f"{where}: {alone} stands beside query and gallery (found: {found}): {LAYOUT}")
