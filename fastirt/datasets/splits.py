"""Names of splits, and the choice of the splits to use."""

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
LAYOUT = "the splits are train, and test or val, or query and gallery"


def split_name(text: str) -> str | None:
    """The split that `text` names, in any case or by a synonym; None if it names no split."""
    return SYNONYMS.get(text.strip().casefold())


def family(split: str) -> str:
    """The value of --eval-split for a split: query and gallery together are the test split."""
    return split if split in ("train", "val") else "test"


def choose(parts: Iterable[tuple[str, str]], eval_split: str, training: bool | None, place: str) -> str | None:
    """The family to evaluate on, "test" or "val", among the data set's (family, split) pairs.

    None if there is no split to evaluate on. Logs the choice if it differs from `eval_split`.
    Raises UserError if a split is missing that the command needs (`training` as in `load_dataset`),
    or if the splits do not belong together. `place` names the data set in messages.
    """
    parts = set(parts)
    log = logging.getLogger("fastirt")
    names = ", ".join(name for name in SPLITS if any(split == name for _, split in parts)) or "none"
    families = [name for name in ("test", "val") if any(of == name for of, _ in parts)]
    chosen = eval_split if eval_split in families else (families[0] if families else None)
    _check_family({split for of, split in parts if of == chosen}, names, place)
    trains = ("train", "train") in parts
    if training is True and not trains:
        raise UserError(f"{place}: the split train is missing (found: {names}): {LAYOUT}")
    if training is False and chosen is None:
        raise UserError(f"{place}: the split test is missing (found: {names}): evaluation needs it: {LAYOUT}")
    if training is None and not parts:
        raise UserError(f"{place}: no splits: {LAYOUT}")
    if len(families) == 2:
        other = "val" if chosen == "test" else "test"
        log.info(f"{place}: evaluation uses the {chosen} split; for the {other} split pass --eval-split {other}")
    elif chosen is not None and chosen != eval_split:
        log.warning(f"{place}: there is no {eval_split} split: evaluation uses the {chosen} split")
    elif chosen is None and training:
        log.warning(f"{place}: no test split: evaluation is skipped")
    return chosen


def _check_family(splits: set[str], names: str, place: str) -> None:
    pair = {"query", "gallery"}
    absent = sorted(pair - splits) if splits & pair else []
    if absent:
        raise UserError(f"{place}: the split {absent[0]} is missing (found: {names}): {LAYOUT}")
    if len(splits) > 1 and splits != pair:
        alone = sorted(splits - pair)[0]
        raise UserError(f"{place}: {alone} cannot be combined with query and gallery (found: {names}): {LAYOUT}")
