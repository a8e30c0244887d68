"""From the bytes of a file to bytes that all decoders decode to the same pixels.

Ordinary JPEG, PNG, WebP and BMP files pass unchanged. Pillow decodes and resizes all other images
here, in the reading threads, and passes them on as lossless images of their final size. With
orientation "exif", a JPEG's metadata is replaced by the orientation that Pillow reads from it, and
other files with metadata are turned by Pillow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from fastirt.config.options import InputConfig
from fastirt.images.decoders.interface import BYTES_PER_PIXEL, READERS
from fastirt.images.formats.header_check import MAX_PIXELS, BadImage, inspect
from fastirt.images.formats.jpeg import with_orientation
from fastirt.images.formats.pillow import SIDEWAYS, lossless, open_image, orientation_of, rgb, upright_size
from fastirt.images.formats.png_webp_bmp import has_png_metadata
from fastirt.images.formats.structure import Broken, Structure, complaint
from fastirt.images.resize_crop import check_shape, resized_size

Encoded = tuple[np.ndarray, tuple[int, int]]  # bytes, (height, width) of the decoded image

_SMALL = 2**20  # pixels: up to this size an image is resized here even if that enlarges it


def prepare(data: np.ndarray, path: str, input: InputConfig) -> Encoded:
    """(bytes for the decoders, (height, width) of the decoded image). Raises BadImage.

    data: (length,) uint8, the file. path: its name in errors.
    """
    encoded = data.tobytes()
    structure = inspect(encoded, path)
    size = structure.height, structure.width
    try:
        check_shape(*size, input.resize)
    except ValueError as error:
        raise BadImage(path, str(error)) from None
    if structure.plain and not (input.orientation == "exif" and structure.metadata):
        return data, size
    if structure.plain and encoded[:2] == b"\xff\xd8":
        orientation = jpeg_orientation(encoded, structure)
        upright = with_orientation(encoded, structure.metadata, orientation)
        return np.frombuffer(upright, np.uint8), size[::-1] if orientation in SIDEWAYS else size
    return by_pillow(encoded, path, input)


def jpeg_orientation(encoded: bytes, structure: Structure) -> int:
    """EXIF orientation, 1 to 8."""
    if not structure.metadata:
        return 1
    try:
        with open_image(encoded) as image:
            return orientation_of(image)
    except Broken:  # reported when the image is decoded
        return 1


def by_pillow(encoded: bytes, path: str, input: InputConfig) -> Encoded:
    """The image decoded, turned and resized by Pillow, as a lossless file. Raises BadImage."""
    try:
        with open_image(encoded) as opened, held_by_pillow(opened):
            image = rgb(opened, input.orientation)
            height, width = resized_size(image.height, image.width, input.resize, input.resize_size)
            # A narrow strip may become enormous: the decoders, which work in parts, resize it.
            if height * width <= max(_SMALL, image.height * image.width):
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            return np.frombuffer(lossless(image), np.uint8), (image.height, image.width)
    except Broken as broken:
        raise BadImage(path, str(broken)) from None
    except Exception as error:  # Pillow raises nearly anything on a broken image
        raise BadImage(path, complaint(error)) from None


def held_by_pillow(image: Image.Image) -> Any:
    """Reserves memory for an image as decoded, as turned, and as converted to RGB."""
    return READERS.hold(image.width * image.height * BYTES_PER_PIXEL * 3)


def stored_size(path: str, orientation: str) -> tuple[int, int]:
    """(height, width) of the decoded image in its orientation, from the file's header.

    Raises any exception for an unusable file.
    """
    with open(path, "rb") as file, open_image(file) as image:
        if image.format == "PNG" and not has_png_metadata(np.memmap(path, np.uint8, "r")):
            # Without this shortcut Pillow decodes the image to look for metadata behind the pixels.
            return image.height, image.width
        height, width = image.height, image.width
        if height * width > MAX_PIXELS:
            raise BadImage(path, f"{width} x {height} pixels")
        with held_by_pillow(image):
            return upright_size(image, orientation)
