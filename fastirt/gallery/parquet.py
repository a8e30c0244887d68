"""Vectors, paths and metadata as Arrow tables: for Parquet files and for LanceDB.

The vector is a fixed-size list of float32, which Qdrant, Milvus, pgvector and LanceDB load
(fastirt/retrieval/README.md has the lines for each).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Mapping, Optional

import numpy as np

from fastirt.atomic import atomic_write
from fastirt.datasets.records import valid_utf8
from fastirt.errors import UserError, first_line
from fastirt.gallery.rows import ROOT, Rows

if TYPE_CHECKING:
    from fastirt.gallery.stores.base import Store

PATH, VECTOR, ROOT_NAME = "path", "vector", "root"


def arrow() -> Any:
    """pyarrow. Raises UserError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'fastirt[parquet]'")
    return pyarrow


def column_types(rows: Iterable[Rows]) -> dict[str, str]:
    """int, float or string by what all values of a metadata column are."""
    kinds: dict[str, set[type]] = {}
    for part in rows:
        for name in part.metadata_columns:
            values = part.columns[name].distinct()
            kinds.setdefault(name, set()).update(type(value) for value in values if value is not None)
    return {name: _type_name(found) for name, found in kinds.items()}


def _type_name(found: set[type]) -> str:
    if found == {int}:
        return "int"
    return "float" if found and found <= {int, float} else "string"


def schema(dim: int, columns: Mapping[str, str], extra: Optional[str] = None) -> Any:
    """path, the vector, one more column of text if `extra` names it, and the metadata columns."""
    pa = arrow()
    taken = sorted({PATH, VECTOR, extra} & set(columns))
    if taken:
        raise UserError(f"metadata column '{taken[0]}' has the name of the gallery's own: rename it")
    types = {"int": pa.int64(), "float": pa.float64(), "string": pa.string()}
    fields = [pa.field(PATH, pa.string(), nullable=False), *([pa.field(extra, pa.string())] if extra else [])]
    vector = pa.field(VECTOR, pa.list_(pa.field("item", pa.float32(), nullable=False), dim), nullable=False)
    return pa.schema([*fields, vector, *(pa.field(name, types[kind]) for name, kind in columns.items())])


def to_table(rows: Rows, vectors: np.ndarray, schema: Any) -> Any:
    """A table of rows in this schema; vectors: (R, D) float32."""
    pa = arrow()
    arrays = []
    for field in schema:
        if field.name == VECTOR:
            flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        elif field.name == PATH:
            arrays.append(pa.array([valid_utf8(path) for path in rows.paths], pa.string()))
        else:
            values = rows.values(ROOT if field.name == ROOT_NAME and ROOT_NAME not in rows.columns else field.name)
            if pa.types.is_string(field.type):
                values = [None if value is None else valid_utf8(str(value)) for value in values]
            try:
                arrays.append(pa.array(values, field.type))
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise UserError(f"metadata column '{field.name}' holds {field.type}: {first_line(error)}")
    return pa.Table.from_arrays(arrays, schema=schema)


def export(file: Path, store: Store, dim: int) -> int:
    """Write all rows of a gallery; their number. The file appears when it is whole."""
    pa, count = arrow(), 0
    layout = schema(dim, store.types)
    check_folder(file)
    try:
        with atomic_write(file) as temporary:
            with pa.parquet.ParquetWriter(temporary, layout) as writer:
                for rows, vectors in store.batches():
                    writer.write_table(to_table(rows, vectors, layout))
                    count += len(rows)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or first_line(error)})")
    return count


def check_folder(file: Path) -> None:
    """Raises UserError if the file's folder is not there."""
    if not file.parent.is_dir():
        raise UserError(f"{file}: {file.parent} is no folder: make it first")
