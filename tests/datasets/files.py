"""Data sets of empty files, and what is read or refused of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastirt.datasets import Catalog, Split, load_dataset
from fastirt.errors import UserError


def touch(root: Path, *names: str) -> None:
    """Empty files: a catalogue opens only what has no extension."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def rows(split: Split, catalog: Catalog) -> list[tuple[str, str]]:
    """(relative path, class name)"""
    return [
        (os.path.relpath(path, catalog.root), catalog.class_names[label])
        for path, label in zip(split.paths, split.labels)
    ]


def refusal(dataset: str, path: Path, **options) -> str:
    """The text of the UserError, always one line."""
    with pytest.raises(UserError) as caught:
        load_dataset(dataset, str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
