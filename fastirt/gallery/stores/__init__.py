"""Where the vectors of a gallery lie: files that are memory-mapped, or a database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastirt.errors import UserError

if TYPE_CHECKING:
    from fastirt.gallery.stores.files import FileStore
    from fastirt.gallery.stores.lance import LanceStore

STORES = ("files", "lancedb")


def store_class(name: str) -> type[FileStore] | type[LanceStore]:
    """Raises UserError for a name that is not in STORES."""
    if name == "files":
        from fastirt.gallery.stores.files import FileStore

        return FileStore
    if name == "lancedb":
        from fastirt.gallery.stores.lance import LanceStore

        return LanceStore
    raise UserError(f"--store '{name}': choose from {', '.join(STORES)}")


def open_store(folder: Path, state: dict[str, Any], dim: int, device: str) -> FileStore | LanceStore:
    """What the manifest's `store` describes."""
    return store_class(state["name"])(folder, state, dim, device)
