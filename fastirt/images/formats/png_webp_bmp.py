"""PNG, WebP and BMP files: checks of their structure without decoding."""

from __future__ import annotations

import struct
import zlib
from typing import Iterator

from fastirt.images.formats.structure import Broken, Structure

_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_METADATA = frozenset((b"eXIf", b"iTXt", b"tEXt", b"zTXt"))
_WEBP_ANIMATION, _WEBP_XMP, _WEBP_EXIF, _WEBP_ALPHA = 2, 4, 8, 16  # flags of a VP8X chunk


def parse_png(data: bytes) -> Structure:
    """Walk all chunks to IEND and verify their checksums. Raises Broken.

    Decoded by Pillow only (not `plain`): 16 bits per channel, which DALI truncates.
    """
    header, seen, metadata = None, set(), []
    for kind, start, stop in png_chunks(data):
        if zlib.crc32(memoryview(data)[start + 4 : stop - 4]) != struct.unpack_from(">I", data, stop - 4)[0]:
            raise Broken("PNG with a wrong checksum")
        length = stop - start - 12
        if header is None:
            if kind != b"IHDR" or length != 13:
                raise Broken("PNG without a header")
            header = _png_header(data, start + 8)
        elif kind == b"IHDR":
            raise Broken("PNG with two headers")
        if kind == b"PLTE" and (length == 0 or length % 3 or length > 768):
            raise Broken("PNG with a broken palette")
        if kind in _PNG_METADATA:
            metadata.append((start, stop))
        seen.add(kind)
    height, width, depth, color_type = header
    if b"IDAT" not in seen or (color_type == 3 and b"PLTE" not in seen):
        raise Broken("PNG without image data")
    return Structure(height, width, depth < 16, tuple(metadata))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, stop) of each chunk up to IEND. Raises Broken for a truncated file."""
    at = 8
    while True:
        if at + 12 > len(data):
            raise Broken("PNG cut off")
        length, kind = struct.unpack_from(">I4s", data, at)
        stop = at + 12 + length
        if stop > len(data):
            raise Broken("PNG cut off")
        yield kind, at, stop
        if kind == b"IEND":
            return
        at = stop


def has_png_metadata(data: bytes) -> bool:
    """Whether a PNG file has a chunk that may hold an orientation, before or behind its pixels."""
    return any(kind in _PNG_METADATA for kind, _, _ in png_chunks(data))


def _png_header(data: bytes, at: int) -> tuple[int, int, int, int]:
    """(height, width, bits per channel, color type)."""
    width, height, depth, color_type, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, at)
    if depth not in _PNG_DEPTHS.get(color_type, ()) or compression or filtering or interlace > 1:
        raise Broken("PNG with a broken header")
    return height, width, depth, color_type


def parse_webp(data: bytes) -> Structure:
    """Walk the chunks to the first frame. Raises Broken.

    Decoded by Pillow only (not `plain`): animations, and files with data such as EXIF after the
    image, because DALI reads on into that data if a damaged image lacks bytes.
    """
    stop = 8 + struct.unpack_from("<I", data, 4)[0]
    if stop > len(data):
        raise Broken("WebP cut off")
    at, canvas, flags = 12, None, 0
    while at + 8 <= stop:
        kind, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > stop:
            raise Broken("WebP cut off")
        body = data[at + 8 : at + 8 + min(length, 16)]
        last = at + 8 + length + (length & 1) == len(data)
        if kind == b"VP8X" and at == 12:
            if length != 10 or body[0] & 0xC1 or any(body[1:4]):
                raise Broken("WebP with a broken header")
            flags = body[0]
            canvas = int.from_bytes(body[7:10], "little") + 1, int.from_bytes(body[4:7], "little") + 1
        elif kind == b"ANMF" and flags & _WEBP_ANIMATION:
            return Structure(*canvas, plain=False)
        elif kind == b"VP8 ":
            if length < 10 or body[0] & 1 or body[3:6] != b"\x9d\x01\x2a":
                raise Broken("WebP with a broken header")
            width, height = struct.unpack_from("<HH", body, 6)
            return _webp_structure(canvas, flags, (height & 0x3FFF, width & 0x3FFF), last)
        elif kind == b"VP8L":
            if length < 5 or body[0] != 0x2F:
                raise Broken("WebP with a broken header")
            bits = int.from_bytes(body[1:5], "little")
            return _webp_structure(canvas, flags, ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1), last)
        elif canvas is None or (kind == b"ALPH" and not flags & _WEBP_ALPHA):
            raise Broken("WebP with a broken header")
        at += 8 + length + (length & 1)
    raise Broken("WebP without image data")


def _webp_structure(canvas: tuple[int, int] | None, flags: int, size: tuple[int, int], last: bool) -> Structure:
    if canvas is not None and canvas != size:
        raise Broken("WebP whose header and image differ in size")
    tagged = flags & (_WEBP_EXIF | _WEBP_XMP)
    return Structure(*size, last and not tagged and not flags & _WEBP_ANIMATION)


def parse_bmp(data: bytes) -> Structure:
    """Check header, palette and length. Raises Broken.

    Decoded by Pillow only (not `plain`): headers of other sizes than 40 bytes, 16 bits, bit masks
    and run-length coding.
    """
    offset, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, planes, bits = struct.unpack_from("<HHHH", data, 18)
        return Structure(height, width, plain=False)
    if header < 16:
        raise Broken("BMP with a broken header")
    width, height, planes, bits = struct.unpack_from("<iiHH", data, 18)
    height = abs(height)  # negative: stored from the top down
    compression = struct.unpack_from("<I", data, 30)[0] if header >= 20 else 0
    if width < 1 or planes != 1:
        raise Broken("BMP with a broken header")
    if header != 40 or (bits, compression) not in ((1, 0), (4, 0), (8, 0), (24, 0), (32, 0)):
        return Structure(height, width, plain=False)
    colors = struct.unpack_from("<I", data, 46)[0]
    if colors > 256 or (bits <= 8 and (colors > 1 << bits or offset < 54 + 4 * (colors or 1 << bits))):
        raise Broken("BMP with a broken palette")
    if offset < 54 or offset + (width * bits + 31) // 32 * 4 * height > len(data):
        raise Broken("BMP cut off")
    return Structure(height, width)
