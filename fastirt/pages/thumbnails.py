"""Small JPEG copies of images, as data URIs."""

from __future__ import annotations

import base64
import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, NamedTuple, Optional, Sequence, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from fastirt.images.formats.pillow import open_image, rgb
from fastirt.images.source import FileSource, ImageSource

QUALITY = 72
T = TypeVar("T")


class Thumbnail(NamedTuple):
    """What an <img> shows: a data URI and its size in pixels; `readable` is False for the
    placeholder of an image that cannot be shown."""

    uri: str
    width: int
    height: int
    readable: bool = True


class Thumbnails:
    """Thumbnails of the images of one source, each decoded once.

    Args:
        source: encoded images by row.
        side: of the square that they fit in, in pixels; smaller images keep their size.
        orientation: "exif" turns images upright, "stored" does not.
    """

    def __init__(self, source: ImageSource, side: int, orientation: str = "exif") -> None:
        self.source, self.side, self.orientation = source, side, orientation
        self._made: dict[int, Thumbnail] = {}

    def prepare(self, rows: Iterable[int]) -> None:
        """Make the thumbnails of these rows, by a few threads."""
        missing = sorted(set(rows) - self._made.keys())
        self._made.update(zip(missing, _in_threads(self._make, missing)))

    def __getitem__(self, row: int) -> Thumbnail:
        """Of a row that was prepared."""
        return self._made[row]

    def images(self, rows: Sequence[int]) -> list[Optional[Image.Image]]:
        """The small RGB images of these rows; None for an unreadable one."""
        return _in_threads(self._image, rows)

    def _make(self, row: int) -> Thumbnail:
        image = self._image(row)
        return placeholder(self.side) if image is None else thumbnail_of(image)

    def _image(self, row: int) -> Optional[Image.Image]:
        try:
            return small_image(self.source.read(int(row)), self.side, self.orientation)
        except Exception:  # Pillow raises nearly anything on a broken file
            return None


def _in_threads(make: Callable[[int], T], rows: Sequence[int]) -> list[T]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "fastirt-thumbnails") as pool:
        return list(pool.map(make, rows))


def of_files(files: Iterable[Optional[str]], side: int, orientation: str = "exif") -> dict[Optional[str], Thumbnail]:
    """The thumbnails of files by name; None, the name of what has no file, gets the placeholder."""
    names = sorted({os.fspath(file) for file in files if file is not None})
    made = Thumbnails(_EachFile(names), side, orientation)
    made.prepare(range(len(names)))
    return {None: placeholder(side), **{name: made[row] for row, name in enumerate(names)}}


def small_image(encoded: np.ndarray, side: int, orientation: str) -> Image.Image:
    """An encoded image as RGB that fits in a square. Raises any of Pillow's exceptions."""
    with open_image(encoded.tobytes()) as image:
        image.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded at a half, quarter or eighth
        image = rgb(image, orientation)
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2)
    return image


def thumbnail_of(image: Image.Image) -> Thumbnail:
    """An RGB image as a JPEG in a data URI."""
    return Thumbnail(data_uri(image, "JPEG", quality=QUALITY, optimize=True), *image.size)


def data_uri(image: Image.Image, kind: str, **options: object) -> str:
    """The image, encoded by Pillow, as a data URI."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


@functools.cache
def placeholder(side: int) -> Thumbnail:
    """A gray square with a cross, in place of an image that cannot be shown."""
    image = Image.new("RGB", (side, side), (128, 128, 128))
    first, last = side // 3, side - side // 3
    pen = ImageDraw.Draw(image)
    pen.line((first, first, last, last), (200, 200, 200), max(2, side // 32))
    pen.line((first, last, last, first), (200, 200, 200), max(2, side // 32))
    return thumbnail_of(image)._replace(readable=False)


class _EachFile(FileSource):
    """Files without a common folder: a missing one is an unreadable image."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(())
        self._paths = paths
