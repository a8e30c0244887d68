"""The user's own pictures: class folders, a CSV list, or what `fastirt demo` wrote."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

from fastirt.catalog.files import pictures, read_rows, require_files, require_folder, subfolders
from fastirt.catalog.records import Catalog, assemble
from fastirt.errors import UserError

SPLITS = ("train", "test", "query", "gallery")
COLUMNS = ("path", "label", "split")
LAYOUT = "train/ beside test/, or train/, query/ and gallery/"


def load_folder(data_path: str, dataset: str = "folder") -> Catalog:
    """One folder per class; the first half of the sorted classes trains. Or train/ beside test/; or train/, query/,
    gallery/, with class folders in each. Sub-folders of a class folder belong to the class."""
    root = require_folder(data_path, "give --data-path the folder that holds one folder per class")
    folders = subfolders(root)
    # A folder called train that holds pictures but no folders is a class: a set of toys has one.
    parts = [name for name in SPLITS if name in folders and subfolders(root / name)]
    if parts:
        _check_parts(parts, str(root))
        ignored = [name for name in folders if name not in parts]
        if ignored:
            logging.getLogger("fastirt").warning(f"{root}: not read beside {'/, '.join(parts)}/: {', '.join(ignored)}")
        return assemble(dataset, str(root), {name: _classes(root / name, subfolders(root / name)) for name in parts})
    records = _classes(root, folders)
    classes = list(dict.fromkeys(name for _, name in records))
    if len(classes) < 2:
        raise UserError(
            f"{root}: one class only ('{classes[0]}'), half of the classes train: at least 2 are needed, or {LAYOUT}"
        )
    training = set(classes[: len(classes) // 2])
    return assemble(
        dataset,
        str(root),
        {"train": [r for r in records if r[1] in training], "test": [r for r in records if r[1] not in training]},
    )


def load_demo(data_path: str) -> Catalog:
    """What `fastirt demo OUT` wrote: demo.json beside train/ and test/."""
    remedy = "make the demo set with `fastirt demo OUT` and give --data-path OUT"
    root = require_folder(data_path, remedy)
    try:
        known = isinstance(json.loads((root / "demo.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        known = False
    if not known:
        raise UserError(f"{root / 'demo.json'}: missing or unreadable: {remedy}, or pass --dataset folder")
    for part in ("train", "test"):
        require_folder(root / part, remedy)
    return assemble("demo", str(root), {p: _classes(root / p, subfolders(root / p)) for p in ("train", "test")})


def load_csv(data_path: str) -> Catalog:
    """A .csv file, or a folder that holds split.csv, with the columns path, label and split.

    Paths are relative to the file; split is train, and test or query and gallery. The row of an error is the line
    of the file as an editor counts it (the header is row 1).
    """
    file = Path(os.path.abspath(os.path.expanduser(data_path)))
    if file.is_dir():
        file = file / "split.csv"
    root = file.parent
    rows = _read_csv(file)
    names = [fields[0] for _, fields in rows]
    paths = [os.path.join(root, name) for name in names]
    seen: dict[str, int] = {}
    for (row, (name, _, _)), path in zip(rows, paths):
        first = seen.setdefault(os.path.normpath(path), row)
        if first != row:
            raise UserError(f"{file.name}: row {row}: '{name}' is listed in row {first} already: keep one of them")
    parts = [name for name in SPLITS if any(fields[2] == name for _, fields in rows)]
    _check_parts(parts, str(file))
    require_files(file, root, [row for row, _ in rows], names, paths)
    records: dict[str, list[tuple[str, str]]] = {name: [] for name in parts}
    for path, (_, (_, label, split)) in zip(paths, rows):
        records[split].append((path, label))
    return assemble("csv", str(root), records)


def _read_csv(file: Path) -> list[tuple[int, tuple[str, str, str]]]:
    """(row, (path, label, split)) of each row that is not blank; raises UserError."""
    lines = read_rows(file, f"a list with the columns {','.join(COLUMNS)} belongs there")
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    rows = []
    try:
        header = [name.strip().lower() for name in next(reader)]
        absent = [name for name in COLUMNS if name not in header]
        if absent:
            raise UserError(
                f"{file}: row 1: no column {' and no column '.join(absent)} in '{lines[0][:80]}': "
                f"the first row must name the columns {','.join(COLUMNS)}"
            )
        where = [header.index(name) for name in COLUMNS]
        for fields in reader:
            row = reader.line_num
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{file.name}: row {row}: {len(fields)} fields for {len(header)} columns: "
                    "put names that contain commas between double quotes"
                )
            values = [fields[i].strip() for i in where]
            for name, value in zip(COLUMNS, values):
                if not value or "\0" in value:
                    raise UserError(f"{file.name}: row {row}: the column {name} is empty or not text: fill it in")
            if values[2] not in SPLITS:
                raise UserError(f"{file.name}: row {row}: unknown split '{values[2]}': use one of {', '.join(SPLITS)}")
            rows.append((row, tuple(values)))
    except csv.Error as error:
        raise UserError(f"{file.name}: row {reader.line_num}: not a CSV row ({error}): check its quotes") from None
    if not rows:
        raise UserError(f"{file}: no rows below the header: list one picture per row")
    return rows


def _check_parts(parts: list[str], where: str) -> None:
    """Raises UserError unless the splits are train and test, or train, query and gallery."""
    if parts not in (["train", "test"], ["train", "query", "gallery"]):
        wanted = ("train", "query", "gallery") if {"query", "gallery"} & set(parts) else ("train", "test")
        absent = [name for name in wanted if name not in parts]
        problem = f"the split {absent[0]} is missing" if absent else "test stands beside query and gallery"
        raise UserError(f"{where}: {problem} (found: {', '.join(parts)}): {LAYOUT}, is what is read")


def _classes(folder: Path, names: list[str]) -> list[tuple[str, str]]:
    """(path, class) of all pictures in the class folders; raises UserError where there is none at all."""
    records, empty = [], []
    for name in names:
        found = pictures(folder / name)
        records += [(path, name) for path in found]
        if not found:
            empty.append(name)
    if not records:
        raise UserError(f"{folder}: no pictures in class folders: {folder}/CLASS/picture.jpg is what is read")
    if empty:
        logging.getLogger("fastirt").warning(
            f"{folder}: {len(empty)} class folders hold no pictures and are left out: "
            + ", ".join(empty[:5])
            + (", …" if len(empty) > 5 else "")
        )
    return records
