"""What the structure of an encoded image says before it is decoded."""

from __future__ import annotations

from typing import NamedTuple


class Structure(NamedTuple):
    """height, width: in pixels, as stored.
    plain: DALI decodes this kind of file, to the same pixels as Pillow.
    metadata: (start, stop) of the blocks that may hold an orientation (EXIF, XMP); only for plain files."""

    height: int
    width: int
    plain: bool = True
    metadata: tuple[tuple[int, int], ...] = ()


class Broken(Exception):
    """An image that cannot be used, and the reason."""


def complaint(error: Exception, verb: str = "decoded") -> str:
    """What a library says of an image, in one line: `cannot be decoded: …`."""
    return " ".join(f"cannot be {verb}: {error}".split())[:200]
