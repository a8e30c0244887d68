"""Folders and list files, read with errors that name the file and the row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Sequence

from fastirt.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def require_folder(path: str | Path, remedy: str) -> Path:
    """`path` as an absolute folder; raises UserError with the remedy where there is none."""
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}: {remedy}")
    return folder


def read_rows(path: Path, remedy: str) -> list[str]:
    """The lines of a UTF-8 list file; row r of an error message is element r - 1 here."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: row {row}: not UTF-8 text: save the file as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty: {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def missing(paths: Sequence[str]) -> list[int]:
    """Positions of the paths that are no files: one scan per folder instead of one stat per picture."""
    folders: dict[str, list[int]] = {}
    for position, path in enumerate(paths):
        folders.setdefault(os.path.dirname(path), []).append(position)
    absent = []
    for folder, positions in folders.items():
        try:
            with os.scandir(folder) as entries:
                present = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            present = set()
        absent += [position for position in positions if os.path.basename(paths[position]) not in present]
    return sorted(absent)


def require_files(list_file: Path, root: Path, rows: Sequence[int], names: Sequence[str], paths: Sequence[str]) -> None:
    """Raises UserError for the first of `paths` that is no file; `rows` and `names` say where the list has it."""
    absent = missing(paths)
    if absent:
        first = absent[0]
        more = f" ({len(absent)} of {len(paths)} are missing)" if len(absent) > 1 else ""
        raise UserError(
            f"{list_file.name}: row {rows[first]}: no file '{names[first]}' under {root}{more}: "
            "put the picture there or take the row out"
        )


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__")))


def pictures(folder: Path) -> list[str]:
    """Sorted absolute names of the pictures in and below a folder, by their extension."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, f) for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return sorted(found)
