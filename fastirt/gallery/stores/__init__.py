"""Where the vectors of a gallery lie: files that are memory-mapped, or a database."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from fastirt.errors import UserError
from fastirt.gallery.stores.base import State, Store

STORES = ("files", "lancedb")


def create_store(name: str, folder: Path, dim: int) -> Store:
    """An empty one. Raises UserError for a name that is not in STORES."""
    return _open(name, folder, None, dim, "cpu")


def open_store(folder: Path, state: State, dim: int, device: str) -> Store:
    """What the manifest's `store` describes."""
    return _open(state["name"], folder, state, dim, device)


def _open(name: str, folder: Path, state: Optional[State], dim: int, device: str) -> Store:
    if name == "files":
        from fastirt.gallery.stores.files import EMPTY, FileStore

        return FileStore(folder, state or EMPTY, dim, device)
    if name == "lancedb":
        from fastirt.gallery.stores.lance import EMPTY, LanceStore

        return LanceStore(folder, state or EMPTY, dim)
    raise UserError(f"--store '{name}': choose from {', '.join(STORES)}")
