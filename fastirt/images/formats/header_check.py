"""Is this a whole image? Judged from its structure, before a decoder sees it.

DALI reads the headers of a batch in parallel, and one that it rejects can bring the process down, so nothing unchecked may
reach it. (What fails later, in decoding, is an ordinary exception.) The check reads headers, lengths and end markers, about
15 µs for a JPEG. Formats that DALI does not get are opened by Pillow, which reads their header.
"""

from __future__ import annotations

import struct

import numpy as np

from fastirt.images.formats.jpeg import parse_jpeg
from fastirt.images.formats.pillow import open_image
from fastirt.images.formats.png_webp_bmp import parse_bmp, parse_png, parse_webp
from fastirt.images.formats.structure import Broken, Structure

MAX_PIXELS = 64 * 2**20  # a 20,000 × 20,000 image takes 15 s and 6 GB to decode
MAX_SIDE = 65_500  # libjpeg's own limit
MAX_BYTES = 2**29  # of one file


class BadImage(Exception):
    """An image that cannot be used: `path` names it, `reason` says why in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Undecodable(Exception):
    """Some images of a batch passed the check and failed in the decoder: `reasons` maps batch position to reason."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} undecodable: {reasons}")
        self.reasons = reasons


def inspect(data: bytes | np.ndarray | memoryview, path: str = "") -> Structure:
    """The structure of an encoded image; raises BadImage for anything that Pillow does not open, is not whole or too large.

    The format is told by content, never by file name. Bytes after the end of the image are tolerated. Nothing is decoded, and no
    memory is taken for pixels.
    """
    encoded = data if isinstance(data, bytes) else bytes(data)
    try:
        structure = _parse(encoded)
    except Broken as broken:
        raise BadImage(path, str(broken)) from None
    except (struct.error, IndexError):
        raise BadImage(path, "cut off inside a header") from None
    height, width = structure.height, structure.width
    if height < 1 or width < 1:
        raise BadImage(path, f"size {width} x {height}")
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise BadImage(
            path, f"{width} x {height} pixels, the limit is {MAX_PIXELS / 1e6:.0f} million, {MAX_SIDE:,} a side"
        )
    return structure


def _parse(data: bytes) -> Structure:
    if data[:2] == b"\xff\xd8":
        return parse_jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return parse_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return parse_webp(data)
    if data[:2] == b"BM":
        return parse_bmp(data)
    if not data:
        raise Broken("empty file")
    with open_image(data) as image:
        return Structure(image.height, image.width, plain=False)
