"""Images of a user as vectors and rows of a gallery."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery.rows import FILE, Rows
from fastirt.inference.image_list import ImageList

if TYPE_CHECKING:
    from fastirt.inference.model import Model

OnBad = Callable[[int, str, str], None]  # row, name, reason of an image that cannot be read


def load_model(model: Model | str | Path, device: Optional[str]) -> Model:
    """A Model as it is, or what `fastirt.load` takes."""
    if not isinstance(model, (str, Path)):
        return model
    from fastirt.inference.load import load

    return load(model, device=device)


def encode(
    model: Model, images: Any, batch_size: int, progress: bool, on_bad: Optional[OnBad]
) -> tuple[np.ndarray, Rows]:
    """(N, D) vectors of the readable images, and their rows. Raises UserError if there are none."""
    listed = ImageList.of(images)
    vectors = model.encode(listed, batch_size=batch_size, progress=progress, on_bad=on_bad)
    readable = ~np.isnan(vectors[:, 0])
    if not readable.any():
        raise UserError(f"{listed.place}: none of its {len(listed):,} images can be read")
    rows = rows_of(listed)
    return (vectors, rows) if readable.all() else (vectors[readable], rows.take(readable))


def rows_of(listed: ImageList) -> Rows:
    """Names, folders and metadata of a list."""
    root = listed.root or os.getcwd()
    roots = [file and _root(name, file, root) for name, file in zip(listed.names, listed.files)]
    return Rows.of(listed.names, roots, listed.metadata)


def _root(name: str, file: str, root: str) -> str:
    """The root, unless it does not lead to the file, as with ../a.jpg in a CSV file."""
    return root if os.path.join(root, name) == file else FILE + file


def encode_queries(
    model: Model, images: Any, batch_size: int, on_bad: Optional[OnBad]
) -> tuple[np.ndarray, tuple[str, ...], dict[int, str]]:
    """((Q, D) vectors, Q names, reasons by row of unreadable images, whose vectors are NaN)."""
    listed, errors = ImageList.of(images), {}

    def note(row: int, name: str, reason: str) -> None:
        errors[row] = reason
        if on_bad is not None:
            on_bad(row, name, reason)

    vectors = model.encode(listed, batch_size=batch_size, on_bad=note)
    return vectors, listed.names, errors
