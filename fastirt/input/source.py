"""Where encoded pictures come from: files. A packed store has the same three methods."""

from __future__ import annotations

import os
from typing import Protocol, Sequence

import numpy as np

from fastirt.input.check import MAX_BYTES, BadPicture


class PictureSource(Protocol):
    """Encoded pictures by row of a split."""

    def __len__(self) -> int: ...

    def path(self, row: int) -> str:
        """The picture's name in messages."""

    def read(self, row: int) -> np.ndarray:
        """(bytes,) uint8, encoded; raises BadPicture where it cannot be read. The loader checks what is inside."""


class FileSource:
    """One file a picture."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, row: int) -> str:
        return self._paths[row]

    def read(self, row: int) -> np.ndarray:
        path = self._paths[row]
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise BadPicture(path, f"{size:,} bytes, the limit is {MAX_BYTES:,}")
                return np.frombuffer(file.read(), np.uint8)
        except OSError as error:
            raise BadPicture(path, (error.strerror or type(error).__name__).lower()) from None
