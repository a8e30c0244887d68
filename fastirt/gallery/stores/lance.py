"""Vectors in a LanceDB table on disk, for galleries that outgrow memory.

LanceDB keeps versions of a table. The gallery's manifest names the version that counts, so a change
that was cut off before the manifest was renamed is not seen, and undone by the next one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

from fastirt.datasets.records import valid_utf8
from fastirt.errors import UserError, first_line
from fastirt.gallery.bundle import LANCE
from fastirt.gallery.filters import Condition, number
from fastirt.gallery.parquet import PATH, ROOT_NAME, VECTOR, column_types, schema, to_table
from fastirt.gallery.rows import FILE, Row, Rows
from fastirt.gallery.stores.base import State, missing, names_of

TABLE = "gallery"
BLOCK = 65536  # rows written at once
PATHS = 500  # in one condition
LARGEST = "1.7976931348623157e308"
LANCE_ERRORS = (ValueError, RuntimeError, OSError)
EMPTY: State = {"name": "lancedb", "table": None, "version": None, "rows": 0, "columns": {}}


def _connect(folder: Path) -> Any:
    return _lancedb().connect(str(folder / LANCE))


def _lancedb() -> Any:
    try:
        import lancedb
    except ImportError:
        raise UserError("--store lancedb needs lancedb: pip install 'fastirt[lancedb]'")
    return lancedb


class LanceStore:
    """One version of the table. A change returns the state of the next one."""

    def __init__(self, folder: Path, state: State, dim: int) -> None:
        self.folder, self.state, self.dim = folder, state, dim
        _lancedb()
        if state["table"] is None:
            return
        try:
            self.table = _connect(folder).open_table(state["table"])
            self.table.checkout(state["version"])
            rows = self.table.count_rows()
        except LANCE_ERRORS as error:
            raise UserError(f"{folder / LANCE}: lancedb cannot open version {state['version']} of the table ({error})")
        if rows != state["rows"]:
            raise UserError(f"{folder / LANCE}: {rows:,} rows in place of {state['rows']:,}: damaged")

    def files(self, state: State) -> list[str]:
        return []  # lancedb looks after its own

    def __len__(self) -> int:
        return int(self.state["rows"])

    @property
    def columns(self) -> list[str]:
        return list(self.state["columns"])

    @property
    def types(self) -> dict[str, str]:
        return dict(self.state["columns"])

    def search(
        self, queries: np.ndarray, k: int, conditions: Sequence[Condition], exact: bool = False
    ) -> list[list[tuple[float, Row]]]:
        where = " AND ".join(to_sql(condition, self.state["columns"]) for condition in conditions)
        names = [PATH, ROOT_NAME, *self.columns, "_distance"]
        found = []
        for query in queries:
            search = self.table.search(query, vector_column_name=VECTOR).distance_type("dot")
            if where:
                search = search.where(where, prefilter=True)
            try:
                rows = search.select(names).limit(min(k, len(self))).to_list() if len(self) else []
            except LANCE_ERRORS as error:
                raise self._unreadable(error)
            found.append([(1 - row["_distance"], self._row(row)) for row in rows])
        return found

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder / LANCE}: lancedb cannot read the table: it is damaged, or was rebuilt since it was "
            f"opened: open the gallery again ({first_line(error)})"
        )

    def _row(self, row: dict[str, Any]) -> Row:
        return Row(row[PATH], row[ROOT_NAME], {name: row[name] for name in self.columns})

    def batches(self, size: int = BLOCK) -> Iterator[tuple[Rows, np.ndarray]]:
        first = 0
        while first < len(self):
            try:
                table = self.table.search().limit(size).offset(first).to_arrow()
            except LANCE_ERRORS as error:
                raise self._unreadable(error)
            rows = [self._row(row) for row in table.select([PATH, ROOT_NAME, *self.columns]).to_pylist()]
            vectors = table[VECTOR].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
            yield _rows(rows, self.columns), vectors
            first += len(rows)

    def add(self, vectors: np.ndarray, rows: Rows, generation: int, replaced: set[str]) -> State:
        columns = self.state["columns"]
        first = self.state["table"] is None
        if first:
            columns = column_types([rows])
            _check_names(columns)
        elif extra := set(rows.metadata_columns) - set(columns):
            raise UserError(f"{self.folder}: its table has no column {', '.join(sorted(extra))}: build it again")
        layout = schema(self.dim, columns, ROOT_NAME)
        blocks = (
            to_table(rows.slice(start, start + BLOCK), vectors[start : start + BLOCK], layout)
            for start in range(0, len(rows), BLOCK)
        )
        name = self.state["table"] or f"{TABLE}-{generation}"
        if first:
            database = _connect(self.folder)
            if name in database.table_names():  # of a writer that was killed
                database.drop_table(name)
            self.table = database.create_table(name, next(blocks))
        else:
            self.table.restore()
            for condition in _any_of(replaced):
                self.table.delete(condition)
        for block in blocks:
            self.table.add(block)
        return self._now({**self.state, "table": name, "columns": columns})

    def remove(self, names: Sequence[str], generation: int) -> State:
        known = {valid_utf8(written): name for written, name in names_of(names).items()}
        found: set[str] = set()
        for condition in _any_of(known):
            for row in self.table.search().where(condition).select([PATH, ROOT_NAME]).limit(len(self)).to_list():
                found |= {row[PATH], Row(row[PATH], row[ROOT_NAME], {}).file or ""}
        if unknown := set(names) - {known[name] for name in found & known.keys()}:
            raise missing(unknown, self.folder)
        self.table.restore()
        for condition in _any_of(known):
            self.table.delete(condition)
        return self._now(self.state)

    def delete_unused(self, state: State) -> None:
        database = _connect(self.folder)
        for name in database.table_names():
            if name != state["table"]:
                database.drop_table(name)

    def indexed(self, state: State, kind: str, params: str, generation: int) -> State:
        raise UserError(f"--kind {kind}: an index of FAISS is for --store files: leave one of them out")

    def _now(self, state: State) -> State:
        return {**state, "version": self.table.version, "rows": self.table.count_rows()}


def _rows(rows: Sequence[Row], columns: Sequence[str]) -> Rows:
    metadata = {name: [row.metadata[name] for row in rows] for name in columns}
    return Rows.of([row.path for row in rows], [row.root for row in rows], metadata)


def _check_names(columns: Iterable[str]) -> None:
    """Raises UserError for a column name that SQL cannot hold."""
    for name in columns:
        if not re.fullmatch(r"\w[\w -]*", name) or name.lower().startswith("_"):
            raise UserError(f"metadata column '{name}': lancedb cannot hold one of this name: rename it")


def to_sql(condition: Condition, columns: dict[str, str]) -> str:
    """The condition in lancedb's SQL, with the meaning of `Condition.holds`."""
    column, operator, text = f"`{condition.column}`", condition.operator, condition.text
    bound, numeric = number(text), columns[condition.column] != "string"
    if numeric and bound is None and (text or operator not in ("=", "!=")):  # no number equals text
        return "true" if operator == "!=" else "false"
    exact = columns[condition.column] == "int" and isinstance(bound, int) and abs(bound) < 2**63
    value = column if exact else f"CAST({column} AS double)"
    if operator in ("=", "!="):
        literal = f"{value} = {bound!r}" if numeric else f"{column} = {_quoted(text)}"
        equal = f"{column} IS NOT NULL AND {literal}"
        if text == "":
            equal = f"{column} IS NULL" if numeric else f"{column} IS NULL OR {column} = ''"
        return f"({equal})" if operator == "=" else f"(NOT ({equal}))"
    if bound is None:
        return f"({column} != '' AND {column} {operator} {_quoted(text)})"
    if not numeric:  # in SQL the text nan is larger than every number
        value = f"try_cast(btrim({column}) AS double)"
        return f"({value} BETWEEN -{LARGEST} AND {LARGEST} AND {value} {operator} {float(bound)!r})"
    return f"({value} {operator} {bound!r})"


def _quoted(text: str) -> str:
    return "'" + valid_utf8(text).replace("'", "''") + "'"


def _any_of(paths: Iterable[str]) -> Iterator[str]:
    """Conditions that together hold for the rows of these paths or files."""
    ordered = sorted(paths)
    for first in range(0, len(ordered), PATHS):
        some = ordered[first : first + PATHS]
        listed, files = (", ".join(map(_quoted, names)) for names in (some, [FILE + name for name in some]))
        yield f"{PATH} IN ({listed}) OR {ROOT_NAME} IN ({files}) OR concat({ROOT_NAME}, '/', {PATH}) IN ({listed})"
