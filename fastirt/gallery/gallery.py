"""A gallery of images that is searched by image: one folder with the model, the vectors and the list."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery import bundle
from fastirt.gallery.filters import check_columns, parse_where
from fastirt.gallery.rows import Row, Rows
from fastirt.gallery.stores import open_store, store_class

if TYPE_CHECKING:
    from fastirt.inference.model import Model

log = logging.getLogger("fastirt")

OnBad = Callable[[int, str, str], None]  # called with row, name and reason of an image that cannot be read


class Neighbors(NamedTuple):
    """What one query found, nearest first; nothing for an image that cannot be read."""

    paths: list[str]  # (k,) as the gallery lists them
    similarities: np.ndarray  # (k,) float32: the cosine of unit vectors
    metadata: list[dict[str, Any]]  # (k,)
    files: list[Optional[str]]  # (k,) where the images were when they were indexed, None where in no file
    query: str = ""  # its name
    error: str = ""  # why it could not be read


class Gallery:
    """Images with their vectors, on disk; made by `build`, or opened by `open`.

    Several threads may search one Gallery. A change is atomic, of one writer at a time, and seen by
    other Gallery objects once they are opened anew.
    """

    def __init__(self, folder: Path, model: Optional[Model], device: Optional[str], verify: bool) -> None:
        """Use `Gallery.open`."""
        self.folder, self.device, self.verify = folder, device, verify
        self.model_lock = threading.Lock()
        self.loaded = model
        self.state = self._read(verify)
        if model is not None:
            check_model(folder, self.manifest, model)
