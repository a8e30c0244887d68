"""Finished vectors as .npy, .safetensors or .parquet, written in parts, not in memory as a whole.

The rows of all three: path, width, height, bad (0 or 1), reason, and the metadata. What describes
them, digests among it, is one JSON object.

    x.npy           (N, D); x.npy.csv has the rows, x.npy.json the description
    x.safetensors   tensors `vectors` (N, D), `sizes` (N, 2) width and height, `bad` (N,), and
                    `rows`, the bytes of that CSV file; metadata `vectors`: the description
    x.parquet       the rows, and a column `vector` of D values; metadata `vectors` likewise
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator

import numpy as np

from fastirt.atomic import sync_folder
from fastirt.datasets.records import valid_utf8
from fastirt.errors import UserError
from fastirt.inference.image_list import ImageList

COLUMNS = ("path", "width", "height", "bad", "reason")
PART_BYTES = 2**26  # of vectors that are held at a time
_SAFETENSORS = {"f4": "F32", "f2": "F16"}


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError if `out` cannot be written: its ending, folder, a missing package."""
    if out.suffix.lower() not in WRITERS:
        raise UserError(f"{out}: end the name of OUT in {', '.join(WRITERS)}")
    if out.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{out}: Parquet needs pyarrow: pip install 'fastirt[parquet]', or end the name in .npy")
    if out.is_dir():
        raise UserError(f"{out}: is a folder: name a file")
    # those beside OUT may be of this very work, which was killed between writing them and OUT
    files = (out,) if part_folder(out).exists() else files_of(out)
    if there := [file for file in files if file.exists() and not overwrite]:
        raise UserError(f"{there[0]}: exists: pass --overwrite to replace it, or choose another OUT")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: its folder cannot be made ({error.strerror}): choose another OUT") from None
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: cannot be written (no permission): choose another OUT")


class Rows:
    """The rows beside the vectors."""

    def __init__(self, images: ImageList, sizes: np.ndarray, bad: dict[int, str]) -> None:
        self.images, self.sizes, self.bad = images, sizes, bad
        # A user's column that has the name of one of ours: `given_path`.
        taken = {*COLUMNS, "vector", *images.metadata}
        self.metadata = {}
        for name, texts in images.metadata.items():
            own = name
            while name in (*COLUMNS, "vector") and own in taken:
                own = f"given_{own}"
            self.metadata[own] = texts

    def __len__(self) -> int:
        return len(self.images)

    def write_csv(self, file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        quoting = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow((*COLUMNS, *self.metadata))
        metadata = list(self.metadata.values())
        for row, (name, (width, height)) in enumerate(zip(self.images.names, self.sizes.tolist())):
            reason = self.bad.get(row, "")
            further = [texts[row] for texts in metadata]
            # csv leaves "\r" unquoted, which readers take for the end of a row
            safe = quoting if "\r" in "".join((name, *further)) else writer
            safe.writerow((name, width, height, int(row in self.bad), reason, *further))
        text.flush()
        text.detach()

    def columns(self, rows: slice) -> dict[str, list[Any]]:
        """The columns of a part; only bytes of names that are not UTF-8 become escape sequences."""
        numbers = range(*rows.indices(len(self)))
        return {
            "path": [valid_utf8(name) for name in self.images.names[rows]],
            "width": self.sizes[rows, 0].tolist(),
            "height": self.sizes[rows, 1].tolist(),
            "bad": [row in self.bad for row in numbers],
            "reason": [valid_utf8(self.bad.get(row, "")) for row in numbers],
            **{valid_utf8(name): [valid_utf8(text) for text in texts[rows]] for name, texts in self.metadata.items()},
        }


def write_vectors(out: Path, vectors_file: Path, rows: Rows, description: dict[str, Any]) -> None:
    """Write `out` by its ending. It appears at once and last, so that what exists is complete.

    Args:
        out: file to write.
        vectors_file: .npy (N, D), which becomes `out` itself where that is .npy.
        rows: beside the vectors.
        description: JSON values: digests, model, preprocessing.
    """
    for old in files_of(out):  # OUT first: else a kill below would leave the old vectors beside new rows
        old.unlink(missing_ok=True)
    WRITERS[out.suffix.lower()](out, vectors_file, rows, description)


def files_of(out: Path) -> tuple[Path, ...]:
    """What is written for `out`: itself, and the rows and the description beside an .npy file."""
    beside = (".csv", ".json") if out.suffix.lower() == ".npy" else ()
    return out, *(out.with_name(out.name + ending) for ending in beside)


def part_folder(out: Path) -> Path:
    """Where the vectors are until they are finished."""
    return out.with_name(f".{out.name}.part")


@contextlib.contextmanager
def _placed(target: Path, folder: Path) -> Iterator[Path]:
    """A name in `folder`; what is written there is synced to disk and becomes `target`.

    Not `atomic_write`, whose temporary file would stay beside `target` after a kill.
    """
    temporary = folder / f"new{target.suffix}"
    yield temporary
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    sync_folder(target.parent)


def _write_npy(out: Path, vectors_file: Path, rows: Rows, description: dict[str, Any]) -> None:
    _, rows_file, description_file = files_of(out)
    folder = vectors_file.parent
    with _placed(rows_file, folder) as temporary, open(temporary, "wb") as file:
        rows.write_csv(file)
    with _placed(description_file, folder) as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n")
    os.replace(vectors_file, out)
    sync_folder(out.parent)


def _write_safetensors(out: Path, vectors_file: Path, rows: Rows, description: dict[str, Any]) -> None:
    vectors = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
    bad = np.zeros(len(rows), bool)
    bad[list(rows.bad)] = True
    sizes = np.ascontiguousarray(rows.sizes)
    table = vectors_file.with_name("rows.csv")
    with open(table, "wb") as file:
        rows.write_csv(file)
    shapes: dict[str, tuple[str, tuple[int, ...], int]] = {
        "vectors": (_SAFETENSORS[vectors.dtype.str[1:]], vectors.shape, vectors.nbytes),
        "sizes": ("I32", sizes.shape, sizes.nbytes),
        "bad": ("BOOL", bad.shape, bad.nbytes),
        "rows": ("U8", (table.stat().st_size,), table.stat().st_size),
    }
    with _placed(out, vectors_file.parent) as temporary, open(temporary, "wb") as file:
        file.write(_safetensors_header(shapes, description))
        for _, part in _parts(vectors_file):
            file.write(part.data)
        file.write(sizes.data)
        file.write(bad.data)
        with open(table, "rb") as written:
            shutil.copyfileobj(written, file)


def _safetensors_header(shapes: dict[str, tuple[str, tuple[int, ...], int]], description: dict[str, Any]) -> bytes:
    """Length and JSON header of a .safetensors file whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"vectors": json.dumps(description)}}
    start = 0
    for name, (dtype, shape, size) in shapes.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_parquet(out: Path, vectors_file: Path, rows: Rows, description: dict[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    vectors = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
    kinds = {"width": pa.int32(), "height": pa.int32(), "bad": pa.bool_()}
    fields = [pa.field(name, kinds.get(name, pa.string())) for name in rows.columns(slice(0, 0))]
    fields.append(pa.field("vector", pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1])))
    schema = pa.schema(fields, metadata={"vectors": json.dumps(description)})
    with _placed(out, vectors_file.parent) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for numbers, part in _parts(vectors_file):
            columns = rows.columns(numbers)
            arrays = [pa.array(values, field.type) for values, field in zip(columns.values(), fields)]
            flat = pa.array(part.reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, part.shape[1]))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _parts(vectors_file: Path) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of an .npy file in parts; a memory map would in the end count as memory as a whole."""
    vectors = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
    count = max(1, PART_BYTES // max(1, vectors[:1].nbytes))
    with open(vectors_file, "rb") as file:
        file.seek(vectors.offset)
        for first in range(0, len(vectors), count):
            rows = min(count, len(vectors) - first)
            part = np.fromfile(file, vectors.dtype, rows * vectors.shape[1])
            yield slice(first, first + rows), part.reshape(rows, -1)


WRITERS: dict[str, Callable[[Path, Path, Rows, dict[str, Any]], None]] = {
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
}
