"""A gallery of images that is searched by image: one folder with model, vectors and list."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery.encode import OnBad, encode, encode_queries, load_model
from fastirt.gallery.filters import Condition, parse_where
from fastirt.gallery.generation import check_model, load_own_model, open_generation, search_device
from fastirt.gallery.rows import Neighbors, Rows
from fastirt.gallery.writer import Change, checked, first_generation, next_generation
from fastirt.inference.image_list import ImageList

if TYPE_CHECKING:
    from fastirt.gallery.stores.base import Store
    from fastirt.inference.model import Model

Where = Union[str, Sequence[str], None]


class Gallery:
    """Images with their vectors, on disk; `build` makes one and `open` opens it.

    Several threads may search one Gallery. A change is atomic and of one writer at a time. Other
    Gallery objects keep what they opened, and see the change once they are reopened.

    `folder` is the gallery's, `manifest` what its gallery.json says.
    """

    def __init__(self, folder: Path, model: Optional[Model], device: str, verify: bool) -> None:
        """Use `Gallery.open`."""
        self.folder, self.device = folder, device
        self._model, self._model_lock = model, threading.Lock()
        self._opened = open_generation(folder, device, verify)
        if model is not None:
            check_model(folder, self.manifest, model)

    @classmethod
    def build(
        cls,
        model: Model | str | Path,
        images: Any,
        folder: str | Path,
        *,
        kind: Optional[str] = None,
        params: str = "",
        store: str = "files",
        batch_size: int = 64,
        device: Optional[str] = None,
        progress: bool = False,
        on_bad: Optional[OnBad] = None,
    ) -> Gallery:
        """Embed images and write a gallery; one in the folder is replaced when this is whole.

        Args:
            model: a Model, or what `fastirt.load` takes.
            images: as `Model.encode` takes them; unreadable ones are reported and left out.
            folder: absent, empty, or a gallery.
            kind: an index of FAISS's factory, e.g. "HNSW32" or "IVF4096,PQ32"; None: exact search.
            params: of that index, e.g. "nprobe=32" or "efSearch=64".
            store: "files", or "lancedb" for galleries that outgrow memory.
            batch_size, device, progress, on_bad: as of `Model.encode`.

        Raises:
            UserError: another writer is at work, no image can be read, the folder holds other
                files, FAISS cannot build such an index of these vectors.
        """
        model, target, listed = load_model(model, device), Path(folder), ImageList.of(images)
        with first_generation(target, model.dim, store, kind, len(listed)) as change:
            vectors, rows = encode(model, listed, batch_size, progress, on_bad)
            change.create(vectors, rows, model, kind, params)
        return cls.open(target, model, device=device, verify=False)

    @classmethod
    def from_vectors(
        cls,
        vectors: np.ndarray,
        paths: Sequence[str | Path],
        folder: str | Path,
        *,
        metadata: Optional[Mapping[str, Sequence[Any]]] = None,
        root: Optional[str | Path] = None,
        model: Optional[Model] = None,
        kind: Optional[str] = None,
        params: str = "",
        store: str = "files",
    ) -> Gallery:
        """As `build`, of vectors that exist already.

        Args:
            vectors: (N, D) float32, finite, rows of unit length; may be a memory map.
            paths: N names.
            metadata: column name to N texts, numbers or booleans; None: a missing value.
            root: the folder of the paths; None: the rows have no files.
            model: what the vectors are from; None: the gallery is searched by vectors alone.
        """
        vectors, rows, target = checked(vectors), Rows.of(paths, root, metadata), Path(folder)
        with first_generation(target, vectors.shape[1], store, kind, len(vectors)) as change:
            change.create(vectors, rows, model, kind, params)
        return cls.open(target, model, verify=False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: Optional[Model | str | Path] = None,
        *,
        device: Optional[str] = None,
        verify: bool = True,
    ) -> Gallery:
        """Open a gallery to search and change it.

        Args:
            folder: of the gallery.
            model: refuse a gallery of another model than this one; None: take the gallery's own.
            device: where to embed and search; None: a GPU if there is one.
            verify: compare the digests of all files.

        Raises:
            UserError: no gallery, a half-written or damaged one, or one of another model.
        """
        loaded = None if model is None else load_model(model, device)
        return cls(Path(folder), loaded, search_device(device), verify)

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        return f"Gallery('{self.folder}', {len(self):,} images, {self.dim} dimensions)"

    @property
    def manifest(self) -> dict[str, Any]:
        return self._opened.manifest

    @property
    def _store(self) -> Store:
        return self._opened.store

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return int(self.manifest["dim"])

    @property
    def columns(self) -> list[str]:
        """Names of the metadata columns."""
        return self._store.columns

    @property
    def index(self) -> Optional[dict[str, Any]]:
        """Kind, recall and bytes a vector of the FAISS index; None: exact search."""
        return self.manifest["store"].get("index")

    @property
    def model(self) -> Model:
        """The gallery's model, loaded from its folder on first use."""
        with self._model_lock:
            if self._model is None:
                self._model = load_own_model(self.folder, self.manifest, self.device)
            return self._model

    def search(
        self,
        images: Any,
        k: int = 10,
        where: Where = None,
        *,
        exact: bool = False,
        batch_size: int = 64,
        on_bad: Optional[OnBad] = None,
    ) -> list[Neighbors]:
        """The k most similar images of each query image.

        Args:
            images: as `Model.encode` takes them. An unreadable one has no neighbors and an `error`.
            k: neighbors per query; fewer where the gallery or `where` leaves fewer.
            where: a condition on metadata, such as "brand=x", or several, which all must hold.
            exact: search exactly although there is a FAISS index.
        """
        conditions, model = self._conditions(k, where), self.model
        with self._model_lock:
            vectors, names, errors = encode_queries(model, images, batch_size, on_bad)
        readable = [row for row in range(len(names)) if row not in errors]
        hits = dict(zip(readable, self._store.search(vectors[readable], k, conditions, exact)))
        return [Neighbors.of(hits.get(row, []), name, errors.get(row, "")) for row, name in enumerate(names)]

    def search_vectors(
        self, vectors: np.ndarray, k: int = 10, where: Where = None, *, exact: bool = False
    ) -> list[Neighbors]:
        """As `search`, of (Q, D) or (D,) vectors of unit length."""
        queries = checked(np.atleast_2d(vectors), self.dim)
        found = self._store.search(queries, k, self._conditions(k, where), exact)
        return [Neighbors.of(hits) for hits in found]

    def add(self, images: Any, *, batch_size: int = 64, progress: bool = False, on_bad: Optional[OnBad] = None) -> int:
        """Embed further images; the number added. A file of the gallery is embedded again."""
        model = self.model
        with self._change() as change, self._model_lock:
            vectors, rows = encode(model, images, batch_size, progress, on_bad)
            change.add(vectors, rows)
        return len(rows)

    def add_vectors(
        self,
        vectors: np.ndarray,
        paths: Sequence[str | Path],
        *,
        metadata: Optional[Mapping[str, Sequence[Any]]] = None,
        root: Optional[str | Path] = None,
    ) -> int:
        """As `add`, of vectors that exist already; arguments as of `from_vectors`."""
        vectors, rows = checked(vectors, self.dim), Rows.of(paths, root, metadata)
        with self._change() as change:
            change.add(vectors, rows)
        return len(rows)

    def remove(self, paths: str | Path | Iterable[str | Path]) -> int:
        """Remove images by their paths in the gallery or their files; the number removed.

        Raises UserError, and removes nothing, if one of them is not in the gallery.
        """
        listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
        with self._change() as change:
            before = len(change.store)
            change.remove([str(path) for path in listed])
        return before - len(self)

    def export_parquet(self, file: str | Path) -> int:
        """Write path, vector and metadata of all rows to a Parquet file; their number."""
        from fastirt.gallery.parquet import export

        return export(Path(file), self._store, self.dim)

    @contextmanager
    def _change(self) -> Iterator[Change]:
        """Change the newest generation, then open what was written."""
        with next_generation(self.folder, self.manifest) as change:
            yield change
        self._opened = open_generation(self.folder, self.device, verify=False)

    def _conditions(self, k: int, where: Where) -> list[Condition]:
        if k < 1:
            raise UserError(f"k = {k}: ask for one neighbor or more")
        return parse_where(where, self.columns, self.folder)
