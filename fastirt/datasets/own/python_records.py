"""`--dataset FILE.py:NAME`: records from a function of the user."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterable

from fastirt.config.user_code import load_object, parse, user_error
from fastirt.datasets.csv_list import Row, list_rows
from fastirt.datasets.records import Listed, printable
from fastirt.datasets.splits import SPLITS, family, split_name
from fastirt.errors import UserError


def load_own(dataset: str, data_path: str, eval_split: str = "test", training: bool | None = True) -> Listed:
    """List the records that a user's function returns for `data_path`.

    The function gets the absolute path as `pathlib.Path` and returns, or yields, an (image file,
    class, split) for each image: the file absolute or relative to the path; the split train, and
    test or val or query and gallery. An image that is query and gallery has two records.

    dataset: FILE.py:NAME or package.module:NAME. Raises UserError.
    """
    root = Path(os.path.abspath(os.path.expanduser(data_path)))
    if not root.exists():
        raise UserError(f"--data-path {root}: no such file or folder")
    named = parse(dataset)
    place = f"{os.path.basename(named.place)}:{named.name}"
    function = load_object("--dataset", dataset)
    rows = list(_rows(function, dataset, root, place))
    if not rows:
        raise UserError(f"{place}: returned no records for {root}: return (image file, class, split) tuples")
    folder = root if root.is_dir() else root.parent
    return list_rows(rows, named.name, place, place, folder, eval_split, training)


def _rows(function: Callable[[Path], Iterable[Any]], dataset: str, root: Path, place: str) -> Iterable[Row]:
    """The records as rows, numbered from 1. Raises UserError for one that is none."""
    try:
        records = list(function(root))
    except Exception as error:
        raise user_error("--dataset", dataset, error) from error
    for number, record in enumerate(records, 1):
        where = f"{place}: record {number}"
        if not isinstance(record, (tuple, list)) or len(record) != 3:
            raise UserError(f"{where}: '{printable(str(record))[:100]}' is not (image file, class, split)")
        path, label, split = record
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise UserError(f"{where}: '{printable(str(path))[:100]}' is no image file: use a text or a Path")
        name = split_name(str(split))
        if name is None:
            raise UserError(f"{where}: unknown split '{printable(str(split))[:100]}': use one of {', '.join(SPLITS)}")
        if not str(label):
            raise UserError(f"{where}: the class is empty")
        yield Row(number, os.fspath(path), str(label), ((family(name), name),))
