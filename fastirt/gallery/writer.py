"""Changes of a gallery, each a new generation, made while its lock is held."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Optional, Sequence

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery import bundle
from fastirt.gallery.generation import open_generation
from fastirt.gallery.rows import Rows
from fastirt.gallery.stores import create_store
from fastirt.gallery.stores.base import Store

if TYPE_CHECKING:
    from fastirt.inference.model import Model

BLOCK = 65536  # rows checked at once
NOT_UNIT = 0.02  # of the squared length, beyond the rounding of fp16: similarities would be no cosines


class Change:
    """The next generation of a gallery."""

    def __init__(self, folder: Path, store: Store, manifest: Optional[dict[str, Any]]) -> None:
        """manifest: of the generation before; None: this is the first."""
        self.folder, self.store, self.before = folder, store, manifest
        self.number = 1 if manifest is None else int(manifest["generation"]) + 1

    def create(self, vectors: np.ndarray, rows: Rows, model: Optional[Model], kind: Optional[str], params: str) -> None:
        """A gallery of these rows alone, whatever was there before."""
        _check_sizes(vectors, rows)
        if not len(rows):
            raise UserError(f"{self.folder}: no vectors to make a gallery of")
        entry = None
        if model is not None:
            described = {"name": model.config.model.model, "preprocessing": repr(model.transform)}
            entry = {"file": f"model-{self.number}.safetensors", "digest": model.digest, **described}
            model.save(self.folder / entry["file"])
        state = self.store.add(vectors, rows, self.number, set())
        if kind:
            state = self.store.indexed(state, kind, params, self.number)
        self._write({"dim": vectors.shape[1], "model": entry, "built": self.number}, state)

    def add(self, vectors: np.ndarray, rows: Rows) -> None:
        """Further rows; those of the same files are replaced."""
        assert self.before is not None
        _check_sizes(vectors, rows)
        replaced = {file for file in rows.files() if file is not None}
        self._write(self.before, self.store.add(vectors, rows, self.number, replaced))

    def remove(self, names: Sequence[str]) -> None:
        """Without the rows of these paths or files. Raises UserError if one is not there."""
        assert self.before is not None
        if names:
            self._write(self.before, self.store.remove(list(names), self.number))

    def _write(self, kept: dict[str, Any], state: dict[str, Any]) -> None:
        model = kept["model"]
        names = [*self.store.files(state), *([model["file"]] if model else [])]
        known = {} if self.before is None or kept is not self.before else self.before["files"]
        files = {name: known.get(name) or bundle.describe(self.folder / name) for name in names}
        entries = {name: kept[name] for name in ("dim", "model", "built")}
        entries |= {"generation": self.number, "store": state, "files": files}
        manifest = bundle.write_manifest(self.folder, entries)
        bundle.delete_unused(self.folder, manifest)
        self.store.delete_unused(state)


@contextmanager
def first_generation(folder: Path, dim: int, store: str, kind: Optional[str], count: int) -> Iterator[Change]:
    """Build a gallery in `folder`, in place of one that is there.

    Raises UserError, before anything is written, for a folder of other files, another writer, a
    store that is not installed, and a kind that FAISS cannot parse.
    """
    empty = create_store(store, folder, dim)
    if kind and store != "files":
        raise UserError(f"--kind {kind}: an index of FAISS is for --store files: leave one of them out")
    if kind:
        from fastirt.gallery.factory import make_index

        make_index(kind, dim, count)
    bundle.check_may_build(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}")
    with bundle.writing(folder):
        before = bundle.read_manifest(folder) if (folder / bundle.MANIFEST).exists() else None
        try:
            yield Change(folder, empty, before)
        except BaseException:
            if before is None:
                bundle.delete_half_written(folder)
            raise


@contextmanager
def next_generation(folder: Path, manifest: dict[str, Any]) -> Iterator[Change]:
    """Change the newest generation of a gallery that was opened with this manifest.

    Raises UserError if another writer is at work, or the gallery was rebuilt in between.
    """
    if not (folder / bundle.MANIFEST).exists():
        bundle.read_manifest(folder)  # raises
    with bundle.writing(folder):
        opened = open_generation(folder, "cpu", verify=False)
        if any(opened.manifest[name] != manifest[name] for name in ("model", "dim", "built")):
            raise UserError(f"{folder}: was rebuilt since it was opened: open it again")
        yield Change(folder, opened.store, opened.manifest)


def checked(vectors: Any, dim: Optional[int] = None) -> np.ndarray:
    """(N, D) float32. Raises UserError for another shape, and for vectors not of unit length."""
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or not vectors.shape[1] or dim not in (None, vectors.shape[1]):
        raise UserError(f"vectors: {vectors.dtype} {vectors.shape}: pass floats of shape (N, {dim or 'D'})")
    vectors = vectors if vectors.dtype == np.float32 else vectors.astype(np.float32)
    for first in range(0, len(vectors), BLOCK):
        block = vectors[first : first + BLOCK]
        squares = np.vecdot(block, block)
        wrong = np.flatnonzero(~(abs(squares - 1) < NOT_UNIT))  # NaN is wrong as well
        if len(wrong):
            row, square = first + int(wrong[0]), float(squares[wrong[0]])
            found = f"of length {square**0.5:.4g}: divide it by that" if np.isfinite(square) else "not finite"
            raise UserError(f"vectors: row {row} is {found}")
    return vectors


def _check_sizes(vectors: np.ndarray, rows: Rows) -> None:
    if len(vectors) != len(rows):
        raise UserError(f"{len(vectors):,} vectors for {len(rows):,} paths")
