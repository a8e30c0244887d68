"""A CSV list of a user's images."""

from __future__ import annotations

import csv
import logging
import os
import unicodedata
from pathlib import Path
from typing import Iterator, NamedTuple

from fastirt.datasets.listing import Folders, read_rows
from fastirt.datasets.records import Image, Listed, printable
from fastirt.datasets.splits import SPLITS, choose, family, split_name
from fastirt.errors import UserError

COLUMNS = ("path", "label", "split")
# Columns of open-metric-learning: whether a test image is a query, a gallery image or both.
FLAGS = ("is_query", "is_gallery")
BOXES = {"x_1", "y_1", "x_2", "y_2"}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
YES, NO = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no", "", "nan", "none"}


class Row(NamedTuple):
    number: int  # line number in an editor
    path: str  # as written in the file
    label: str
    parts: tuple[tuple[str, str], ...]  # (family, split): see `choose`


def load_csv(data_path: str, eval_split: str = "test", training: bool | None = True) -> Listed:
    """List a CSV file, or split.csv of a folder, with the columns path, label and split.

    Paths are relative to the file. Row numbers in messages are line numbers in an editor.
    """
    file = Path(os.path.abspath(os.path.expanduser(data_path)))
    if os.path.isdir(file):
        file = file / "split.csv"
    return list_rows(_read(file), "csv", file.name, str(file), file.parent, eval_split, training)


def list_rows(
    rows: list[Row],
    dataset: str,
    name: str,
    place: str,
    root: Path,
    eval_split: str = "test",
    training: bool | None = True,
) -> Listed:
    """The images of rows, in the splits that are used.

    Args:
        rows: one an image, paths below `root` or absolute.
        dataset: its name in the catalogue.
        name, place: of the list, short and whole, in messages.
        root: folder of the images.
        eval_split, training: as `load_dataset` takes them.

    Raises UserError for missing files, and for splits that are missing or do not fit together.
    """
    chosen = choose((part for row in rows for part in row.parts), eval_split, training, place)
    used = [row for row in rows if any(of in ("train", chosen) for of, _ in row.parts)]
    records: dict[str, list[Image]] = {}
    listed: dict[tuple[str, str], int] = {}  # (split, path) -> row
    for row, image in _locate(name, root, used):
        for of, split in row.parts:
            if of in ("train", chosen):
                _check_first(listed, name, row, split, os.path.normpath(image.path))
                records.setdefault(split, []).append(image)
    return Listed(dataset, str(root), records, place)


def _check_first(listed: dict[tuple[str, str], int], name: str, row: Row, split: str, path: str) -> None:
    """Raises UserError for a path that is listed twice; only query and gallery may share it."""
    others = ("train", split) if split != "train" else ("train", "test", "val", "query", "gallery")
    for other in others:
        first = listed.get((other, path))
        if first is not None:
            raise UserError(
                f"{name}: row {row.number}: '{printable(row.path)}' is listed in row {first} already: keep one of them"
            )
    listed[split, path] = row.number


def _read(file: Path) -> list[Row]:
    """The rows that are not blank. Raises UserError for a malformed file."""
    lines = read_rows(file, f"put a list with the columns {','.join(COLUMNS)} there")
    skipped, delimiter = _delimiter(lines)
    reader = csv.reader((line + "\n" for line in lines[skipped:]), strict=True, delimiter=delimiter)
    rows = []
    try:
        header = [name.strip().lower() for name in next(reader)]
        positions = _columns(header, file, lines[skipped], skipped + 1)
        boxes = False
        for fields in reader:
            number = skipped + reader.line_num
            if not any(field.strip() for field in fields):
                continue
            fields = _fitted(fields, header, f"{file.name}: row {number}", delimiter)
            boxes = boxes or any(fields[i].strip().lower() not in NO for i in positions.get("box", ()))
            values = {name: fields[i].strip() for name, i in positions.items() if name != "box"}
            rows.append(_row(number, values, file))
    except csv.Error as error:
        number = skipped + reader.line_num
        raise UserError(f"{file.name}: row {number}: not a CSV row ({error}): check its quotes") from None
    if not rows:
        raise UserError(f"{file}: no rows below the header: list one image per row")
    if boxes:
        logging.getLogger("fastirt").warning(
            f"{file}: the boxes in the columns {', '.join(sorted(BOXES & set(header)))} are not applied: whole images "
            "are used"
        )
    return rows


def _delimiter(lines: list[str]) -> tuple[int, str]:
    """(lines before the header, delimiter): of a first line `sep=`, else by the column names."""
    first = lines[0].strip().strip('"')
    if first.lower().startswith("sep=") and len(lines) > 1:
        named = lines[0].lstrip().lstrip('"')[len("sep=") :][:1]
        return 1, named if named == "\t" or named.strip(' "') else ","

    def columns(delimiter: str) -> int:
        names = {name.strip().strip('"').strip().lower() for name in lines[0].split(delimiter)}
        return len(names & {*COLUMNS, *FLAGS})

    return 0, max(DELIMITERS, key=columns)  # the comma in a tie


def _columns(header: list[str], file: Path, line: str, number: int) -> dict:
    """Column name -> position, and "box" -> positions of the box columns. Raises UserError."""
    flagged = [name for name in FLAGS if name in header]
    wanted = [name for name in COLUMNS if name != "split" or name in header or not flagged]
    wanted += FLAGS if flagged else ()
    absent = [name for name in wanted if name not in header]
    if absent:
        raise UserError(
            f"{file}: row {number}: no column {' and no column '.join(absent)} in '{printable(line[:80])}': the first "
            f"row must name the columns {','.join(COLUMNS)}, separated by commas, semicolons or tabs"
        )
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise UserError(f"{file}: row {number}: {header.count(twice[0])} columns are called {twice[0]}: keep one")
    positions: dict = {name: header.index(name) for name in wanted}
    if BOXES <= set(header):
        positions["box"] = [header.index(name) for name in BOXES]
    return positions


def _fitted(fields: list[str], header: list[str], place: str, delimiter: str) -> list[str]:
    """One field per column; tolerates a trailing delimiter in the row or in the header."""
    extra = fields[len(header) :]
    lacking = header[len(fields) :]
    if any(field.strip() for field in extra) or any(lacking):
        raise UserError(
            f"{place}: {len(fields)} fields for {len(header)} columns: put names that contain "
            f"{DELIMITERS.get(delimiter, repr(delimiter))} in double quotes"
        )
    return fields[: len(header)] + [""] * len(lacking)


def _row(number: int, values: dict[str, str], file: Path) -> Row:
    place = f"{file.name}: row {number}"
    for name in COLUMNS:
        if name in values and not values[name]:
            raise UserError(f"{place}: the column {name} is empty: fill it in")
    # Spellings that look alike (Unicode forms, spaces) are one class.
    label = " ".join(unicodedata.normalize("NFC", values["label"]).split())
    split = split_name(values.get("split", "test"))
    if split is None:
        raise UserError(f"{place}: unknown split '{printable(values['split'])}': use one of {', '.join(SPLITS)}")
    return Row(number, values["path"], label, _parts(split, values, place))


def _parts(split: str, values: dict[str, str], place: str) -> tuple[tuple[str, str], ...]:
    """The (family, split) pairs of a row: its split, or query and gallery as its flags say."""
    if "is_query" not in values or split in ("query", "gallery"):
        return ((family(split), split),)
    for name in FLAGS:
        if values[name].lower() not in YES | NO:
            raise UserError(f"{place}: {name} is '{printable(values[name])}': use True or False")
    flagged = tuple(name.removeprefix("is_") for name in FLAGS if values[name].lower() in YES)
    if split == "train":
        if flagged:
            raise UserError(f"{place}: a training row has is_{flagged[0]}: leave it empty, or change its split")
        return (("train", "train"),)
    if not flagged:
        raise UserError(f"{place}: neither is_query nor is_gallery: set one or both to True")
    return tuple((family(split), part) for part in flagged)


def _locate(list_name: str, root: Path, rows: list[Row]) -> Iterator[tuple[Row, Image]]:
    """The rows with their files. Raises UserError for missing files, naming the first."""
    folders = Folders()
    located = [(row, _find(folders, root, row)) for row in rows]
    absent = [row for row, image in located if image is None]
    if absent:
        name = absent[0].path
        more = f" ({len(absent):,} of {len(rows):,} are missing)" if len(absent) > 1 else ""
        near = folders.respelled(os.path.join(root, name.replace("\\", "/")), fold=True)
        if near is not None and os.path.isfile(near):
            remedy = f"'{printable(os.path.relpath(near, root))}' exists: write it as it is on disk"
        else:
            slashes = "write / between folders, " if "\\" in name else ""
            remedy = f"{slashes}put the image there or delete the row"
        raise UserError(
            f"{list_name}: row {absent[0].number}: no file '{printable(name)[:200]}' under {root}{more}: " + remedy
        )
    return ((row, image) for row, image in located if image is not None)


def _find(folders: Folders, root: Path, row: Row) -> Image | None:
    """The row's file: as written, with / for Windows backslashes, or in another Unicode form."""
    written = [os.path.join(root, name) for name in dict.fromkeys((row.path, row.path.replace("\\", "/")))]
    path = next((path for path in written if folders.has(path)), None)
    if path is None:
        path = next((other for other in map(folders.respelled, written) if other and folders.has(other)), None)
    return Image(path, row.label, *folders.identity(path), row.number) if path else None
