"""Vectors in memory-mapped .npy files, with or without a FAISS index beside them."""

from __future__ import annotations

import itertools
import logging
import shutil
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Container, Iterable, Iterator, Sequence

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery.bundle import LANCE, VectorFile
from fastirt.gallery.exact import Exact
from fastirt.gallery.factory import FactoryIndex
from fastirt.gallery.filters import Condition
from fastirt.gallery.parquet import column_types
from fastirt.gallery.rows import Row, Rows
from fastirt.gallery.stores.base import State, missing, names_of

log = logging.getLogger("fastirt")

BLOCK = 65536  # rows copied at once
FILTERS = 16  # that are remembered, with a byte a row
EMPTY: State = {"name": "files", "segments": [], "removed": None, "index": None}


class FileStore:
    """One generation of a gallery: segments, which are numbered through, less the removed rows.

    A change returns the state of the next generation and leaves this one as it is.
    """

    def __init__(self, folder: Path, state: State, dim: int, device: str = "cpu") -> None:
        self.folder, self.state, self.dim = folder, state, dim
        segments = state["segments"]
        self.rows = [Rows.read(folder / segment["list"]) for segment in segments]
        self.exact = Exact([_vectors(folder / segment["vectors"], dim) for segment in segments], device)
        for segment, rows, part in zip(segments, self.rows, self.exact.parts):
            if not len(rows) == len(part) == segment["rows"]:
                raise UserError(f"{folder / segment['list']}: {len(rows):,} rows for {len(part):,} vectors: damaged")
        removed = state["removed"]
        self.kept = None if removed is None else ~np.load(folder / removed, allow_pickle=False)
        self._matching = lru_cache(FILTERS)(self._matches)  # a column of a million values takes seconds
        index = state["index"]
        self.index = None if index is None else FactoryIndex.read(folder / index["file"], self.exact)

    def files(self, state: State) -> list[str]:
        names = [segment[name] for segment in state["segments"] for name in ("vectors", "list")]
        index = state["index"]
        return [*names, *filter(None, [state["removed"], index and index["file"]])]

    def __len__(self) -> int:
        return len(self.exact) if self.kept is None else int(np.count_nonzero(self.kept))

    @cached_property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for rows in self.rows for name in rows.metadata_columns))

    def search(
        self, queries: np.ndarray, k: int, conditions: Sequence[Condition], exact: bool = False
    ) -> list[list[tuple[float, Row]]]:
        keep = self.kept
        if conditions:
            matching = self._matching(tuple(conditions))
            keep = matching if keep is None else matching & keep
        find = self.exact if exact or self.index is None else self.index
        similarities, found = find.search(queries, k, keep)
        return [
            [(value, self.row(number)) for value, number in zip(values, numbers)]
            for values, numbers in zip(similarities.tolist(), found.tolist())
        ]

    def _matches(self, conditions: tuple[Condition, ...]) -> np.ndarray:
        """(N,) bool."""
        return np.concatenate([np.empty(0, bool), *(rows.matches(conditions) for rows in self.rows)])

    def row(self, number: int) -> Row:
        segment = int(np.searchsorted(self.exact.starts, number, side="right")) - 1
        row = self.rows[segment][number - int(self.exact.starts[segment])]
        return row._replace(metadata={**dict.fromkeys(self.columns), **row.metadata})

    def batches(self, size: int = BLOCK) -> Iterator[tuple[Rows, np.ndarray]]:
        for rows, part, start in zip(self.rows, self.exact.parts, self.exact.starts.tolist()):
            for first in range(0, len(part), size):
                end = min(first + size, len(part))
                some, vectors = rows.slice(first, end), part[first:end]
                if self.kept is not None:
                    kept = self.kept[start + first : start + end]
                    some, vectors = some.take(kept), vectors[kept]
                yield some, vectors

    @property
    def types(self) -> dict[str, str]:
        return column_types(self.rows)

    def find(self, names: Container[str]) -> dict[int, list[str]]:
        """By number, each row whose path or file is in `names`, and which of the two are."""
        found: dict[int, list[str]] = {}
        numbers = itertools.count()
        for rows in self.rows:
            for path, file, number in zip(rows.paths, rows.files(), numbers):  # numbers last: zip looks ahead
                if path in names or file in names:
                    found[number] = [name for name in (path, file) if name is not None and name in names]
        return {number: matched for number, matched in found.items() if self.kept is None or self.kept[number]}

    def add(self, vectors: np.ndarray, rows: Rows, generation: int, replaced: set[str]) -> State:
        """The new segment takes in those before it that are no longer than it, so that there are
        few, and each row is written again only when the gallery has doubled.
        """
        kept = self._without(self.find(replaced) if replaced else {})
        segments, parts, lists = list(self.state["segments"]), [vectors], [rows]
        while segments and segments[-1]["rows"] <= sum(map(len, lists)):
            segments.pop()
            parts.insert(0, self.exact.parts[len(segments)])
            lists.insert(0, self.rows[len(segments)])
        state = {**self.state, "segments": [*segments, self._segment(parts, lists, generation)]}
        if not kept.all():
            state["removed"] = self._removed(np.concatenate([kept, np.ones(len(rows), bool)]), generation)
        if self.index is not None:
            self.index.add(vectors)
            state["index"] = {**state["index"], "file": self._index(self.index, generation)}
        return state

    def _without(self, rows: Iterable[int]) -> np.ndarray:
        """(N,) bool: the rows that are kept without these."""
        kept = np.ones(len(self.exact), bool) if self.kept is None else self.kept.copy()
        kept[list(rows)] = False
        return kept

    def remove(self, names: Sequence[str], generation: int) -> State:
        """The rows are rewritten when over half of all are removed, if FAISS can index the rest."""
        known = names_of(names)
        gone = self.find(known)
        if unknown := set(names) - {known[name] for matched in gone.values() for name in matched}:
            raise missing(unknown, self.folder)
        kept = self._without(gone)
        if 2 * np.count_nonzero(kept) >= len(kept):
            return {**self.state, "removed": self._removed(kept, generation)}
        starts = self.exact.starts.tolist()
        masks = [kept[start : start + len(part)] for part, start in zip(self.exact.parts, starts)]
        parts = [part[np.flatnonzero(mask)] for part, mask in zip(self.exact.parts, masks)]
        lists = [rows.take(mask) for rows, mask in zip(self.rows, masks)]
        segment = self._segment(parts, lists, generation)
        state = {**self.state, "segments": [segment] if segment["rows"] else [], "removed": None}
        old = state["index"]
        state["index"] = None
        if old is None or not segment["rows"]:
            return state
        try:
            return self.indexed(state, old["kind"], old["params"], generation)
        except UserError as error:  # too few are left to train on; killed writers' files are deleted later
            log.warning("%s: the index stays as it was: %s", self.folder, error)
            return {**self.state, "removed": self._removed(kept, generation)}

    def delete_unused(self, state: State) -> None:
        shutil.rmtree(self.folder / LANCE, ignore_errors=True)

    def indexed(self, state: State, kind: str, params: str, generation: int) -> State:
        exact = FileStore(self.folder, {**state, "removed": None}, self.dim).exact
        index = FactoryIndex.build(kind, params, exact)
        file = self._index(index, generation)
        quality = index.measure(self.folder / file)._asdict()
        return {**state, "index": {"file": file, "kind": kind, "params": params, **quality}}

    def _segment(self, parts: Sequence[np.ndarray], lists: Sequence[Rows], generation: int) -> State:
        names = {"vectors": f"vectors-{generation}.npy", "list": f"list-{generation}.safetensors"}
        file = VectorFile(self.folder / names["vectors"], self.dim)
        for part in parts:
            for first in range(0, len(part), BLOCK):
                file.append(part[first : first + BLOCK])
        file.close()
        (lists[0] if len(lists) == 1 else Rows.joined(lists)).write(self.folder / names["list"])
        return {"rows": file.rows, **names}

    def _removed(self, kept: np.ndarray, generation: int) -> str:
        name = f"removed-{generation}.npy"
        np.save(self.folder / name, ~kept)
        return name

    def _index(self, index: FactoryIndex, generation: int) -> str:
        name = f"index-{generation}.faiss"
        index.write(self.folder / name)
        return name


def _vectors(file: Path, dim: int) -> np.ndarray:
    """A memory map of (N, D) float32."""
    try:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{file}: not an .npy file of vectors ({error})")
    if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != dim:
        raise UserError(f"{file}: {vectors.dtype} {vectors.shape} in place of float32 (N, {dim})")
    return vectors
