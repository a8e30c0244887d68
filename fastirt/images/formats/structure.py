"""The structure of an encoded image, known before it is decoded."""

from __future__ import annotations

from typing import NamedTuple


class Structure(NamedTuple):
    """The structure of an image.

    Attributes:
        height: pixels, as stored.
        width: pixels, as stored.
        plain: whether DALI decodes it to the same pixels as Pillow.
        metadata: (start, stop) of the blocks with a possible orientation (EXIF, XMP), if plain.
    """

    height: int
    width: int
    plain: bool = True
    metadata: tuple[tuple[int, int], ...] = ()


class Broken(Exception):
    """An unusable image; the message is the reason."""


def complaint(error: Exception, verb: str = "decoded") -> str:
    """A library's error in one line: `cannot be decoded: …`."""
    return " ".join(f"cannot be {verb}: {error}".split())[:200]
