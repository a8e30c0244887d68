"""Folders and list files; errors name the file and the row."""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path
from typing import Sequence

from fastirt.errors import UserError


def require_folder(path: str | Path, remedy: str) -> Path:
    """`path` as an absolute folder; raises UserError with the remedy if it is none."""
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if not os.path.isdir(folder):
        problem = "is a file, not a folder" if os.path.exists(folder) else "no such folder, or no permission"
        raise UserError(f"{folder}: {problem}: {remedy}")
    return folder


def read_rows(path: Path, remedy: str) -> list[str]:
    """The lines of a UTF-8 or UTF-16 list file; row r of an error message is element r - 1."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}): {remedy}") from None
    encoding = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        row = _lines(data[: error.start].decode(encoding, "replace")).count("\n") + 1
        if data.startswith(b"PK\3\4"):
            raise UserError(f"{path}: a workbook or an archive, not text: save the list as CSV in UTF-8") from None
        named = "UTF-16" if encoding.startswith("utf-16") else "UTF-8"
        raise UserError(f"{path}: row {row}: not {named} text: save the file as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty: {remedy}")
    text = _lines(text)
    if "\0" in text:
        row = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path}: row {row}: holds a NUL byte: save the file as UTF-8 text")
    return text.removesuffix("\n").split("\n")


def _encoding(data: bytes) -> str:
    """The encoding by byte order mark, else UTF-16 by its zero bytes, else UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    first = data[:64]
    if len(first) >= 4 and len(first) % 2 == 0:
        for odd, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
            if not any(first[odd::2]) and all(first[1 - odd :: 2]):
                return encoding
    return "utf-8-sig"


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def missing(paths: Sequence[str]) -> list[int]:
    """Positions of the paths without a file."""
    folders = Folders()
    return [position for position, path in enumerate(paths) if not folders.has(path)]


def require_files(list_file: Path, root: Path, rows: Sequence[int], names: Sequence[str], paths: Sequence[str]) -> None:
    """Raises UserError for the first missing file, with its row and name in the list."""
    absent = missing(paths)
    if absent:
        first = absent[0]
        more = f" ({len(absent)} of {len(paths)} are missing)" if len(absent) > 1 else ""
        raise UserError(
            f"{list_file.name}: row {rows[first]}: no file '{names[first]}' under {root}{more}: "
            "put the image there or delete the row"
        )


class Folders:
    """The files of the folders that a list names: one scan per folder instead of calls per file."""

    def __init__(self) -> None:
        # folder -> file name -> (inode, whether it is a link)
        self._files: dict[str, dict[str, tuple[int, bool]]] = {}
        self._real: dict[str, str] = {}
        self._names: dict[str, dict[str, str]] = {}

    def has(self, path: str) -> bool:
        """Whether the path is a file."""
        folder, name = os.path.split(path)
        return name in self._listing(folder)

    def identity(self, path: str) -> tuple[str, int]:
        """(path with links resolved, inode) of an existing file."""
        folder, name = os.path.split(path)
        inode, is_link = self._listing(folder)[name]
        if is_link:
            return os.path.realpath(path), inode_of(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name), inode

    def _listing(self, folder: str) -> dict[str, tuple[int, bool]]:
        if folder not in self._files:
            files = self._files[folder] = {}
            try:
                with os.scandir(folder) as listing:
                    for entry in listing:
                        if _is_file(entry):
                            files[entry.name] = entry.inode(), entry.is_symlink()
            except OSError:
                pass
        return self._files[folder]

    def respelled(self, path: str, fold: bool = False) -> str | None:
        """The existing path that equals `path` in another Unicode form (fold: or another case)."""
        known = os.sep
        for name in path.split(os.sep):
            if os.path.lexists(os.path.join(known, name)):
                known = os.path.join(known, name)
                continue
            if known not in self._names:
                try:
                    names = os.listdir(known)
                except OSError:
                    names = []
                self._names[known] = {_folded(n): n for n in names} | {_composed(n): n for n in names}
            wanted = _composed(name) if not fold else _folded(name)
            if wanted not in self._names[known]:
                return None
            known = os.path.join(known, self._names[known][wanted])
        return known


def inode_of(path: str) -> int:
    """The file's inode; 0 if it has none or does not exist."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a circular link
        return False


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    # No file name ends in a separator, so a folded name never equals another file's real name.
    return _composed(name).casefold() + os.sep
