"""PIL images and arrays as a source of encoded images, so that they take the way of files."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Sequence

import numpy as np
from PIL import Image

from fastirt.errors import UserError
from fastirt.images.formats.header_check import BadImage
from fastirt.images.formats.pillow import lossless, rgb
from fastirt.images.formats.structure import complaint

CHANNELS = (3, 4, 1)


class MemorySource:
    """Images in memory: PIL's of any mode, or arrays (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    They are converted to 8-bit RGB as those of files are, upright with orientation "exif".

    Attributes:
        orientation: of the model that reads them; set before reading.
    """

    def __init__(self, images: Sequence[Any], orientation: str = "stored") -> None:
        """Raises UserError for an array of another shape or of a dtype that holds no pixels."""
        for row, image in enumerate(images):
            if isinstance(image, np.ndarray):
                _check(image, row)
        self._images, self.orientation = images, orientation
        counts = Counter(map(id, images))
        # Two threads must not decode one lazily opened PIL image at the same time.
        self._locks = {key: threading.Lock() for key, count in counts.items() if count > 1}

    def __len__(self) -> int:
        return len(self._images)

    def path(self, row: int) -> str:
        return f"image {row}"

    def read(self, row: int) -> np.ndarray:
        """(length,) uint8, a lossless file. Raises BadImage."""
        image = self._images[row]
        try:
            with self._locks.get(id(image), threading.Lock()):
                return np.frombuffer(lossless(self._rgb(image)), np.uint8)
        except Exception as error:  # Pillow raises nearly anything on a broken image
            raise BadImage(self.path(row), complaint(error)) from None

    def _rgb(self, image: Any) -> Image.Image:
        if isinstance(image, np.ndarray):
            return rgb(to_pil(image), "stored")
        return rgb(image, self.orientation)


def to_pil(array: np.ndarray) -> Image.Image:
    """An array that `_check` accepts. Channels of floats and of 16 bits become bytes one by one."""
    array = np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype == np.uint16:
        scaled = np.rint(array / 257).astype(np.uint8)
    else:
        finite = np.nan_to_num(array.astype(np.float64), nan=0, posinf=0, neginf=0)
        low, high = finite.min(), finite.max()
        scales = (1, 255, 65535) if array.dtype.kind == "f" else (255, 65535, 2**31 - 1)
        bottom, top = next(((0, scale) for scale in scales if low >= 0 and high <= scale), (low, high))
        scaled = np.clip(np.rint((finite - bottom) * (255 / max(top - bottom, 1e-300))), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled)


def _check(array: np.ndarray, row: int) -> None:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in CHANNELS)
    if not shaped or array.dtype.kind not in "buif" or 0 in array.shape:
        raise UserError(
            f"image {row}: an array {array.dtype} {array.shape}: pass (H, W, 3), (H, W, 4) or (H, W), best of uint8"
        )
