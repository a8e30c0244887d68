"""PIL images and arrays as a source of encoded images, so that they take the way of files."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Sequence

import numpy as np
from PIL import Image

from fastirt.config.options import InputConfig
from fastirt.errors import UserError
from fastirt.images.decoders import pil, torchvision
from fastirt.images.formats.header_check import BadImage
from fastirt.images.formats.pillow import lossless, rgb
from fastirt.images.formats.structure import complaint
from fastirt.images.resize_crop import check_shape, resized_size

CHANNELS = (3, 4, 1)
COMMON = ("JPEG", "MPO", "PNG", "WEBP", "BMP", None)  # None: of no file
DEEP = ("I", "F", "CMYK")  # modes
LARGE = 2**20  # pixels


class MemorySource:
    """Images in memory: PIL's of any mode, or arrays (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    They are converted to 8-bit RGB as those of files are, upright with orientation "exif".

    Attributes:
        input: of the model that reads them; set before reading.
    """

    input = InputConfig()

    def __init__(self, images: Sequence[Any]) -> None:
        """Raises UserError for an array of another shape or of a dtype that holds no pixels."""
        for row, image in enumerate(images):
            check_image(image, f"image {row}")
        self._images = images
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
                return np.frombuffer(lossless(self._prepared(image)), np.uint8)
        except Exception as error:  # Pillow raises nearly anything on a broken image
            raise BadImage(self.path(row), complaint(error)) from None

    def _prepared(self, image: Any) -> Image.Image:
        """The RGB image, resized already where the decoder would do the same to a file.

        Batches of whole images would need much memory, and their lossless files much time.
        """
        pixels = to_rgb(image, self.input)
        check_shape(pixels.height, pixels.width, self.input.resize)
        height, width = resized_size(pixels.height, pixels.width, self.input.resize, self.input.resize_size)
        enormous = height * width > max(LARGE, pixels.height * pixels.width)  # a narrow strip
        if enormous or self.input.loader not in ("torchvision", "pil"):
            return pixels
        return Image.fromarray(resized(pixels, image, self.input))


def to_rgb(image: Image.Image | np.ndarray, input: InputConfig) -> Image.Image:
    """The image in 8-bit RGB, upright if `input` says so. Raises any of Pillow's exceptions."""
    return rgb(to_pil(image), "stored") if isinstance(image, np.ndarray) else rgb(image, input.orientation)


def resized(pixels: Image.Image, image: Any, input: InputConfig) -> np.ndarray:
    """(H, W, 3) uint8 as the readers of files resize them.

    pixels: `to_rgb` of `image`, whose format and mode decide: rare ones are Pillow's work.
    """
    size = resized_size(pixels.height, pixels.width, input.resize, input.resize_size)
    of_pillow = isinstance(image, Image.Image) and (image.format not in COMMON or image.mode.startswith(DEEP))
    if input.loader == "torchvision" and not of_pillow:
        return torchvision.resize(np.array(pixels), size, size)
    return pil.resize(pixels, *size)


def to_pil(array: np.ndarray) -> Image.Image:
    """What `check_image` accepts. Channels of floats and of 16 bits become bytes one by one."""
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


def check_image(image: Any, name: str) -> None:
    """Raises UserError for an array without pixels, and for what is neither an array nor PIL's."""
    if isinstance(image, Image.Image):
        return
    if not isinstance(image, np.ndarray):
        raise UserError(f"{name}: a {type(image).__name__}: pass a PIL image or an array")
    array = image
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in CHANNELS)
    if not shaped or array.dtype.kind not in "buif" or 0 in array.shape:
        raise UserError(
            f"{name}: an array {array.dtype} {array.shape}: pass (H, W, 3), (H, W, 4) or (H, W), best of uint8"
        )
