"""One image of a packed store: checked, turned upright, resized, and encoded as JPEG."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastirt.config.options import ORIENTATIONS, RESIZES, SUBSAMPLINGS
from fastirt.datasets.digest import source_stat
from fastirt.errors import UserError
from fastirt.images.formats.header_check import MAX_BYTES, MAX_PIXELS, MAX_SIDE, BadImage, inspect
from fastirt.images.formats.jpeg import with_orientation
from fastirt.images.formats.pillow import open_image, orientation_of, rgb, upright_size
from fastirt.images.formats.structure import Broken, Structure
from fastirt.images.resize_crop import check_shape, resized_size


@dataclass(frozen=True)
class PackedImage:
    """A stored image, or an empty one with the `reason` why its source is unusable."""

    data: bytes  # JPEG
    height: int  # in pixels, as stored
    width: int
    source_size: int  # bytes
    source_mtime: int  # nanoseconds
    source_crc: int
    reason: str = ""


@dataclass(frozen=True)
class Recipe:
    """How images are turned, resized and encoded. Raises UserError for an option out of range."""

    orientation: str  # "exif": turned upright; "stored": as they are
    resize: str  # "square": resize_size × resize_size; "shorter": the shorter side
    resize_size: int  # pixels
    quality: int  # of JPEG, 1 to 100
    subsampling: str

    def __post_init__(self) -> None:
        for flag, value, valid, choices in (
            ("--orientation", self.orientation, self.orientation in ORIENTATIONS, " or ".join(ORIENTATIONS)),
            ("--resize", self.resize, self.resize in RESIZES, " or ".join(RESIZES)),
            ("--resize-size", self.resize_size, 1 <= self.resize_size <= 4096, "1 to 4096"),
            ("--quality", self.quality, 1 <= self.quality <= 100, "1 to 100"),
            ("--subsampling", self.subsampling, self.subsampling in SUBSAMPLINGS, ", ".join(SUBSAMPLINGS)),
        ):
            if not valid:
                raise UserError(f"{flag} {value}: out of range: use {choices}")


def encode_image(path: str, recipe: Recipe) -> PackedImage:
    """Read, check, resize and encode one file. Never raises for a bad image."""
    size, modified = source_stat(path)
    source_crc = 0
    try:
        if size > MAX_BYTES:
            raise BadImage(path, f"{size:,} bytes, the limit is {MAX_BYTES:,}")
        encoded = Path(path).read_bytes()
        source_crc = zlib.crc32(encoded)
        data, height, width = _resize(encoded, inspect(encoded, path), recipe)
        return PackedImage(data, height, width, size, modified, source_crc)
    except BadImage as bad:
        reason = bad.reason
    except Broken as broken:
        reason = str(broken)
    except Exception as error:  # Pillow raises nearly anything on a broken file
        reason = f"{type(error).__name__}: {error}"
    return PackedImage(b"", 0, 0, size, modified, source_crc, " ".join(reason.split())[:200] or "unreadable")


def _resize(encoded: bytes, structure: Structure, recipe: Recipe) -> tuple[bytes, int, int]:
    """(JPEG, height, width), by Pillow: upright, RGB, bicubic with antialias like torchvision's."""
    with open_image(encoded) as image:
        check_shape(image.height, image.width, recipe.resize)
        height, width = resized_size(*upright_size(image, recipe.orientation), recipe.resize, recipe.resize_size)
        if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
            raise ValueError(f"{image.width}x{image.height} would become {width}x{height} pixels")
        unchanged = structure.plain and (image.format, image.mode, image.size) == ("JPEG", "RGB", (width, height))
        pixels = rgb(image, recipe.orientation)  # decodes the whole image, so damage shows
        is_upright = recipe.orientation == "exif" and orientation_of(image) == 1
    if unchanged and recipe.orientation == "stored":
        return encoded, height, width
    if unchanged and is_upright:
        return with_orientation(encoded, structure.metadata, 1), height, width
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(out, "JPEG", quality=recipe.quality, subsampling=recipe.subsampling)
    return out.getvalue(), height, width
