"""Sources of encoded images: the interface, and files. Packed stores are in `packed_store`."""

from __future__ import annotations

import os
import stat
from typing import Protocol, Sequence

import numpy as np

from fastirt.errors import UserError
from fastirt.images.formats.header_check import MAX_BYTES, BadImage

NONBLOCK = getattr(os, "O_NONBLOCK", 0)


class ImageSource(Protocol):
    """Encoded images by row of a split."""

    def __len__(self) -> int: ...

    def path(self, row: int) -> str:
        """The image's name in messages."""

    def read(self, row: int) -> np.ndarray:
        """(length,) uint8, the encoded image, not checked.

        Raises BadImage if it cannot be read, and UserError if the whole source has disappeared.
        """


class FileSource:
    """One file per image. `root` is their common folder: if it disappears, the run stops."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        common = os.path.commonpath((min(paths), max(paths))) if paths else ""
        self.root = os.path.dirname(common) if paths and common == min(paths) else common

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, row: int) -> str:
        return self._paths[row]

    def read(self, row: int) -> np.ndarray:
        path = self._paths[row]
        try:
            # a named pipe that nobody writes to would block without O_NONBLOCK
            with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage(path, "not a regular file")
                size = status.st_size
                if size > MAX_BYTES:
                    raise BadImage(path, f"{size:,} bytes, the limit is {MAX_BYTES:,}")
                return np.frombuffer(file.read(), np.uint8)
        except ValueError as error:  # a NUL byte in the name
            raise BadImage(path, str(error)) from None
        except OSError as error:
            if self.root and not os.path.isdir(self.root):
                raise UserError(
                    f"{self.root}: the folder of the images is gone ({error.strerror}): "
                    "restore it, then continue with --resume"
                ) from None
            raise BadImage(path, (error.strerror or type(error).__name__).lower()) from None
