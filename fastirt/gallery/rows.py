"""The list of a gallery: each row's path and metadata, in files that open by memory map.

A file of rows is a safetensors file. Paths are one UTF-8 text and the end of each path in it. A
metadata column is the distinct values, each as JSON, and each row's number of its value. So a
million rows open without being parsed, and a condition is evaluated once for each distinct value.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery.filters import Condition

ROOT = ""  # the name of the column that holds the folder below which the path is; users cannot name one so
FILE = "file:"  # before the file itself, in that column, where folder and path do not lead to it


class Row(NamedTuple):
    """One image of the gallery."""

    path: str  # as listed: below `root` where there is one
    root: Optional[str]  # the folder of the images when they were indexed, absolute; or FILE and the file
    metadata: dict[str, Any]

    @property
    def file(self) -> Optional[str]:
        """The image's file when it was indexed; None for an image that had none."""
        return _file(self.root, self.path)


def _file(root: Optional[str], path: str) -> Optional[str]:
    if root is None:
        return None
    return root.removeprefix(FILE) if root.startswith(FILE) else os.path.join(root, path)


class Neighbors(NamedTuple):
    """What one query found, nearest first; nothing for an image that cannot be read."""

    paths: list[str]  # (k,) as the gallery lists them
    similarities: np.ndarray  # (k,) float32: the cosine of unit vectors
    metadata: list[dict[str, Any]]  # (k,)
    files: list[Optional[str]]  # (k,) where the images were when they were indexed; None: in no file
    query: str = ""  # its name
    error: str = ""  # why it cannot be read

    @classmethod
    def of(cls, hits: Sequence[tuple[float, Row]], query: str = "", error: str = "") -> Neighbors:
        """hits: (similarity, row)."""
        rows = [row for _, row in hits]
        similarities = np.array([similarity for similarity, _ in hits], np.float32)
        paths, files = [row.path for row in rows], [row.file for row in rows]
        return cls(paths, similarities, [row.metadata for row in rows], files, query, error)


class Texts:
    """Many texts in one array of bytes."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        """text: uint8. ends: (N,) int64, where each text ends; the next begins there."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, values: Sequence[str]) -> Texts:
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        first = self.ends[row - 1] if row else 0
        return self.text[first : self.ends[row]].tobytes().decode("utf-8", "surrogateescape")

    def slice(self, first: int, end: int) -> Texts:
        start = int(self.ends[first - 1]) if first else 0
        ends = self.ends[first:end]
        return Texts(self.text[start : ends[-1] if len(ends) else start], ends - start)

    def __iter__(self) -> Iterator[str]:
        text, first = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[first:end].decode("utf-8", "surrogateescape")
            first = end


class Column(NamedTuple):
    """A metadata column: a value is text, a number, a boolean or None."""

    codes: np.ndarray  # (N,) int32, each row's number in `values`
    values: Texts  # the distinct values as JSON, a comma after each: they are read as one list

    @classmethod
    def of(cls, values: Sequence[Any]) -> Column:
        known: dict[str, int] = {}
        codes = np.fromiter(
            (known.setdefault(json.dumps(_plain(value)), len(known)) for value in values), np.int32, len(values)
        )
        return cls(codes, Texts.of([text + "," for text in known]))

    def __getitem__(self, row: int) -> Any:
        return json.loads(self.values[int(self.codes[row])][:-1])

    def decoded(self) -> list[Any]:
        """The value of each row."""
        if 2 * len(self.codes) < len(self.values):
            return [self[row] for row in range(len(self.codes))]
        values = self.distinct()
        return [values[code] for code in self.codes.tolist()]

    def distinct(self) -> list[Any]:
        return json.loads(f"[{self.values.text.tobytes().decode()[:-1]}]")

    def matches(self, condition: Condition) -> np.ndarray:
        """(N,) bool."""
        holds = np.fromiter(map(condition.holds, self.distinct()), bool, len(self.values))
        return holds[self.codes]


def _plain(value: Any) -> Any:
    """A value that JSON holds: numpy's numbers as Python's, anything else as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value != value:
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


class Rows:
    """The paths and metadata of one segment of a gallery."""

    def __init__(self, paths: Texts, columns: dict[str, Column]) -> None:
        self.paths, self.columns = paths, columns

    @classmethod
    def of(
        cls,
        paths: Sequence[str | Path],
        root: Optional[str | Path] | Sequence[Optional[str]] = None,
        metadata: Optional[Mapping[str, Sequence[Any]]] = None,
    ) -> Rows:
        """root: of all paths, or of each. metadata: column name to a value a row.

        Raises UserError if a column has another length or no name.
        """
        for name, values in (metadata or {}).items():
            if len(values) != len(paths) or not name:
                raise UserError(f"metadata column '{name}': {len(values):,} values for {len(paths):,} images")
        columns = {name: Column.of(values) for name, values in (metadata or {}).items()}
        one = None if root is None else os.fspath(root) if isinstance(root, (str, Path)) else root
        roots = [one] * len(paths) if one is None or isinstance(one, str) else one
        return cls(Texts.of([os.fspath(path) for path in paths]), {**columns, ROOT: Column.of(roots)})

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts in order; a column that a part lacks is None there."""
        names = dict.fromkeys(name for part in parts for name in part.columns)
        paths = [path for part in parts for path in part.paths]
        columns = {name: Column.of([value for part in parts for value in part.values(name)]) for name in names}
        return cls(Texts.of(paths), columns)

    @classmethod
    def read(cls, file: Path) -> Rows:
        """Open what `write` wrote, by memory map."""
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            names = json.loads((opened.metadata() or {})["columns"])
            arrays = {name: opened.get_tensor(name).numpy() for name in opened.keys()}
        columns = {
            name: Column(arrays[f"{i}.codes"], Texts(arrays[f"{i}.text"], arrays[f"{i}.ends"]))
            for i, name in enumerate(names)
        }
        return cls(Texts(arrays["path.text"], arrays["path.ends"]), columns)

    def write(self, file: Path) -> None:
        from safetensors.numpy import save

        arrays = {"path.text": self.paths.text, "path.ends": self.paths.ends}
        for i, column in enumerate(self.columns.values()):
            arrays |= {f"{i}.codes": column.codes, f"{i}.text": column.values.text, f"{i}.ends": column.values.ends}
        file.write_bytes(save(arrays, {"columns": json.dumps(list(self.columns))}))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Row:
        columns = {name: column[row] for name, column in self.columns.items()}
        return Row(self.paths[row], columns.pop(ROOT, None), columns)

    @property
    def metadata_columns(self) -> list[str]:
        return [name for name in self.columns if name != ROOT]

    def values(self, name: str) -> list[Any]:
        """A column's value of each row."""
        return self.columns[name].decoded() if name in self.columns else [None] * len(self)

    def files(self) -> list[Optional[str]]:
        """`Row.file` of each row."""
        roots = self.values(ROOT)
        return list(map(_file, roots, self.paths))

    def take(self, kept: np.ndarray) -> Rows:
        """kept: (N,) bool."""
        paths = [path for path, keep in zip(self.paths, kept.tolist()) if keep]
        columns = {name: Column(column.codes[kept], column.values) for name, column in self.columns.items()}
        return Rows(Texts.of(paths), columns)

    def slice(self, first: int, end: int) -> Rows:
        """The rows from first to before end."""
        columns = {name: Column(column.codes[first:end], column.values) for name, column in self.columns.items()}
        return Rows(self.paths.slice(first, end), columns)

    def matches(self, conditions: Sequence[Condition]) -> np.ndarray:
        """(N,) bool: the rows that match all conditions; a column that is not here is None."""
        found = np.ones(len(self), bool)
        for condition in conditions:
            column = self.columns.get(condition.column)
            found &= condition.holds(None) if column is None else column.matches(condition)
        return found
