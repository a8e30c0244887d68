"""A CSV file of images to embed: a column `path`, and further columns as metadata."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Optional

from fastirt.datasets.csv_list import DELIMITERS
from fastirt.datasets.listing import Folders, read_rows
from fastirt.datasets.records import printable
from fastirt.errors import UserError

REMEDY = "pass a CSV file with a column `path`"
Columns = dict[str, tuple[str, ...]]


def read_csv(file: Path) -> tuple[tuple[str, ...], tuple[Optional[str], ...], Columns]:
    """(names as written, absolute files, further columns) of a list; commas, semicolons or tabs.

    Paths are relative to the file's folder. Files are not opened. Raises UserError, which names the
    line.
    """
    lines = read_rows(file, REMEDY)
    delimiter = max(DELIMITERS, key=lines[0].count)  # the comma in a tie
    reader = csv.reader((line + "\n" for line in lines), strict=True, delimiter=delimiter)
    rows: list[list[str]] = []
    try:
        header = [name.strip() for name in next(reader)]
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{file.name}: row {reader.line_num}: {len(fields)} fields for {len(header)} columns: put names "
                    f"that contain {DELIMITERS[delimiter]} in double quotes"
                )
            rows.append(fields)
    except csv.Error as error:
        raise UserError(f"{file.name}: row {reader.line_num}: not a CSV row ({error}): check its quotes") from None
    paths = [i for i, name in enumerate(header) if name.lower() == "path"]
    if len(paths) != 1:
        found = printable(lines[0][:80])
        raise UserError(f"{file}: {len(paths)} columns are called path in the first row, '{found}': {REMEDY}")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{file}: {header.count(twice[0])} columns are called '{printable(twice[0])}': keep one")
    if not rows:
        raise UserError(f"{file}: no rows below the header: list one image per row")
    names = tuple(fields[paths[0]].strip() for fields in rows)
    folders, folder = Folders(), os.path.abspath(file.parent)
    files = tuple(_find(folders, folder, name) for name in names)
    columns = {name: tuple(fields[i] for fields in rows) for i, name in enumerate(header) if i != paths[0] and name}
    return names, files, columns


def _find(folders: Folders, folder: str, name: str) -> str:
    """The file: as written, with / for Windows backslashes, or in another Unicode form."""
    written = [os.path.join(folder, text) for text in dict.fromkeys((name, name.replace("\\", "/")))]
    found = next((path for path in written if folders.has(path)), None)
    if found is None:
        found = next((other for other in map(folders.respelled, written) if other and folders.has(other)), None)
    return os.path.normpath(found or written[0])
