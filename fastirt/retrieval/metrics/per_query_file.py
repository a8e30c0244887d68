"""A file with one row a query: what it found first, and its average precision."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from fastirt.atomic import atomic_write
from fastirt.datasets.records import Split, valid_utf8
from fastirt.errors import UserError
from fastirt.retrieval.metrics import per_query
from fastirt.retrieval.positives import UNRANKED, PositiveRanks

Table = dict[str, list[Any]]


def check_per_query_file(path: Optional[Path]) -> None:
    """Raises UserError if the file cannot be written: extension, pyarrow, folder. None: no file."""
    if path is None:
        return
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"--per-query {path}: end its name in .csv or .parquet")
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--per-query {path}: Parquet needs pyarrow: `pip install pyarrow`, or end the name in .csv")
    if os.path.isdir(path):
        raise UserError(f"--per-query {path}: is a folder: name a file")
    try:
        probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--per-query {path}: cannot be written ({error.strerror}): choose another file") from error


def per_query_table(
    ranks: PositiveRanks,
    query: Split,
    query_rows: Tensor,
    gallery: Split,
    gallery_rows: Tensor,
    class_names: Sequence[str],
) -> Table:
    """The columns of the file, by name.

    Columns: `query`, its file; `row`, its row of the split, from 0; `label`; `first_rank` and
    `first_positive`, rank and file of the first gallery image of its class; `r`, their number;
    `ap`; `ap@r`, the term of MAP@R. Empty: what a query without positives does not have, and what
    lies beyond the depth of the ranks.

    Args:
        ranks: of the positives of Q queries.
        query: split of the queries.
        query_rows: (Q,) int64, rows of `query`.
        gallery: split of the gallery.
        gallery_rows: (G,) int64, rows of `gallery`.
        class_names: by label.
    """
    first = per_query.first_rank(ranks)
    # A query without positives takes any row here: `found` is False for it.
    first_rows = gallery_rows[ranks.rows[ranks.starts[:-1].clamp(max=len(ranks.rows) - 1)]]
    average = per_query.average_precision(ranks)
    if ranks.depth is not None:
        average = average.masked_fill(per_query.found(ranks, UNRANKED - 1) < ranks.counts, torch.nan)
    found = torch.isfinite(first).tolist()
    return {
        "query": [query.paths[row] for row in query_rows.tolist()],
        "row": query_rows.tolist(),
        "label": [class_names[query.labels[row]] for row in query_rows.tolist()],
        "first_rank": [int(rank) if there else None for rank, there in zip(first.tolist(), found)],
        "first_positive": [gallery.paths[row] if there else None for row, there in zip(first_rows.tolist(), found)],
        "r": ranks.counts.tolist(),
        "ap": _or_none(average),
        "ap@r": _or_none(per_query.average_precision_at_r(ranks)),
    }


def write_per_query_file(path: Path, parts: Sequence[Table]) -> None:
    """Write the rows of `per_query_table`, atomically, as CSV or Parquet by the file's extension.

    Raises UserError: the file cannot be written.
    """
    table = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    write = _write_csv if path.suffix.lower() == ".csv" else _write_parquet
    try:
        with atomic_write(path) as temporary:
            write(temporary, table)
    except OSError as error:
        raise UserError(f"--per-query {path}: cannot be written ({error.strerror or error})") from error


def _or_none(values: Tensor) -> list[Any]:
    return [None if value != value else value for value in values.tolist()]


def _write_csv(path: Path, table: dict[str, list[Any]]) -> None:
    # surrogateescape: file names that are not UTF-8 keep their bytes
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values()))


def _write_parquet(path: Path, table: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = dict.fromkeys(("row", "first_rank", "r"), pyarrow.int64()) | dict.fromkeys(
        ("ap", "ap@r"), pyarrow.float64()
    )
    columns = {
        name: pyarrow.array(values, kinds[name])
        if name in kinds
        # its text is UTF-8, which names of files need not be
        else pyarrow.array([value if value is None else valid_utf8(value) for value in values], pyarrow.string())
        for name, values in table.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
