"""What every store of a gallery does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterable, Iterator, Protocol, Sequence

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery.filters import Condition
from fastirt.gallery.rows import Row, Rows

State = dict[str, Any]  # `store` of the manifest


class Store(Protocol):
    """One generation of a gallery's rows, which never changes.

    `add`, `remove` and `indexed` write the next one and return its state, for the manifest. They
    are called once, on a store that nobody else reads.
    """

    def __len__(self) -> int: ...

    @property
    def columns(self) -> list[str]:
        """Names of the metadata columns."""

    @property
    def types(self) -> dict[str, str]:
        """int, float or string for each metadata column."""

    def search(
        self, queries: np.ndarray, k: int, conditions: Sequence[Condition], exact: bool = False
    ) -> list[list[tuple[float, Row]]]:
        """(similarity, row) of the k nearest rows of each of (Q, D) queries that match."""

    def batches(self, size: int = 65536) -> Iterator[tuple[Rows, np.ndarray]]:
        """All rows in order, at most `size` at once, with their (R, D) vectors."""

    def files(self, state: State) -> list[str]:
        """The files of a state of which the manifest keeps digests."""

    def add(self, vectors: np.ndarray, rows: Rows, generation: int, replaced: set[str]) -> State:
        """Further rows; those of the files `replaced` are removed."""

    def remove(self, names: Sequence[str], generation: int) -> State:
        """Without the rows of these paths or files. Raises UserError if one is not there."""

    def delete_unused(self, state: State) -> None:
        """Delete what another store or an earlier build left, once `state` is in the manifest."""

    def indexed(self, state: State, kind: str, params: str, generation: int) -> State:
        """The state with a FAISS index. Raises UserError if it cannot be built."""


def missing(paths: Iterable[str], folder: Path) -> UserError:
    """The error of paths that cannot be removed."""
    named = sorted(paths)
    more = f" and {len(named) - 5:,} more" if len(named) > 5 else ""
    return UserError(f"{folder}: not in the gallery, so nothing was removed: {', '.join(named[:5])}{more}")


def names_of(names: Iterable[str]) -> dict[str, str]:
    """What a row's path or file may be, to the name that the user gave."""
    return {**{os.path.abspath(name): name for name in names}, **{name: name for name in names}}
