"""Is this a whole picture? Judged from its structure, before a decoder sees it.

DALI reads the headers of a batch in parallel, and one that it rejects can bring the process down, so nothing unchecked may
reach it. (What fails later, in decoding, is an ordinary exception.) The check reads headers, lengths and end markers, about
15 µs for a JPEG.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

MAX_PIXELS = 64 * 2**20  # a 20,000 × 20,000 picture takes 15 s and 6 GB to decode
MAX_SIDE = 65_500  # libjpeg's own limit
MAX_BYTES = 2**29  # of one file


class BadPicture(Exception):
    """A picture that cannot be used: `path` names it, `reason` says why in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Undecodable(Exception):
    """Some pictures of a batch passed the check and failed in the decoder: `reasons` maps batch position to reason."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} undecodable: {reasons}")
        self.reasons = reasons


def check_picture(data: bytes | np.ndarray | memoryview, path: str = "") -> tuple[int, int]:
    """(height, width) in pixels of an encoded JPEG, PNG, WebP or BMP; raises BadPicture for anything else or not whole.

    The format is told by content, never by file name. Bytes after the end of the picture are tolerated. 16-bit PNG
    is refused: its conversion to 8 bits is defined differently by every decoder.
    """
    encoded = data if isinstance(data, bytes) else bytes(data)
    try:
        height, width = _parse(encoded)
    except _Broken as broken:
        raise BadPicture(path, str(broken)) from None
    except (struct.error, IndexError):
        raise BadPicture(path, "cut off inside a header") from None
    if height < 1 or width < 1:
        raise BadPicture(path, f"size {width} x {height}")
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise BadPicture(
            path, f"{width} x {height} pixels, the limit is {MAX_PIXELS / 1e6:.0f} million, {MAX_SIDE:,} a side"
        )
    return height, width


class _Broken(Exception):
    pass


def _parse(data: bytes) -> tuple[int, int]:
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:2] == b"BM":
        return _bmp(data)
    if not data:
        raise _Broken("empty file")
    if data[:6] in (b"GIF87a", b"GIF89a"):
        raise _Broken("GIF is not supported: convert it to PNG or JPEG")
    if data[:4] in (b"II*\0", b"MM\0*"):
        raise _Broken("TIFF is not supported: convert it to PNG or JPEG")
    raise _Broken("not a JPEG, PNG, WebP or BMP picture")


_PAIR = struct.Struct(">H").unpack_from
_SOF = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive Huffman
_OTHER_SOF = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))


def _jpeg(data: bytes) -> tuple[int, int]:
    """Walks all segments and scans from SOI to EOI (ITU-T T.81, annex B)."""
    at, end, size, quantised = 2, len(data), None, False
    stops: list[int] = []  # where a scan's data ends, in reverse; filled at the first scan
    while True:
        if at + 2 > end:
            raise _Broken("JPEG cut off: no end marker" if stops else "JPEG cut off inside its header")
        if data[at] != 0xFF:
            raise _Broken(f"JPEG with garbage where a marker should be (byte {at})")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xD9:
            if not stops:
                raise _Broken("JPEG without picture data")
            return size
        if at + 4 > end:
            raise _Broken("JPEG cut off inside its header")
        length = _PAIR(data, at + 2)[0]
        stop = at + 2 + length
        if length < 2 or stop > end:
            raise _Broken("JPEG cut off inside its header")
        if marker in _SOF:
            if size is not None:
                raise _Broken("JPEG with two frame headers")
            size, components = _jpeg_frame(data[at + 4 : stop])
        elif marker == 0xDB:
            _jpeg_quantisation(data[at + 4 : stop])
            quantised = True
        elif marker == 0xC4:
            _jpeg_huffman(data[at + 4 : stop])
        elif marker == 0xDA:
            if size is None or not quantised:
                raise _Broken("JPEG without a frame header" if size is None else "JPEG without quantisation tables")
            _jpeg_scan(data[at + 4 : stop], components)
            stops = stops or _jpeg_markers(data, stop)
            while stops and stops[-1] < stop:
                stops.pop()
            if not stops:
                raise _Broken("JPEG cut off: no end marker")
            if stops[-1] == stop:
                raise _Broken("JPEG without picture data")
            stop = stops[-1]
        elif marker in _OTHER_SOF:
            raise _Broken("JPEG with lossless or arithmetic coding, which is not supported")
        elif marker < 0xDC:  # reserved, SOI, restart outside of a scan
            raise _Broken(f"JPEG with a stray marker (byte {at})")
        at = stop


def _jpeg_markers(data: bytes, start: int) -> list[int]:
    """Positions of all markers from `start` on, last first; a stuffed 0xFF and restart markers are part of a scan's data."""
    body = np.frombuffer(data, np.uint8, offset=start)
    found = np.flatnonzero(body[:-1] == 0xFF)
    after = body[found + 1]
    found = found[(after != 0) & (after != 0xFF) & ((after < 0xD0) | (after > 0xD7))]
    return (found[::-1] + start).tolist()


def _jpeg_scan(scan: bytes, components: list[int]) -> None:
    if not scan or not 1 <= scan[0] <= 4 or len(scan) != 4 + 2 * scan[0]:
        raise _Broken("JPEG with a broken scan header")
    if any(name not in components for name in scan[1 : 1 + 2 * scan[0] : 2]):
        raise _Broken("JPEG whose scan names a component that it does not have")


def _jpeg_frame(frame: bytes) -> tuple[tuple[int, int], list[int]]:
    precision, height, width, count = struct.unpack_from(">BHHB", frame)
    if precision != 8:
        raise _Broken(f"JPEG with {precision} bits a channel")
    if count not in (1, 3, 4) or len(frame) != 6 + 3 * count:
        raise _Broken("JPEG with a broken frame header")
    names = list(frame[6::3])
    if len(set(names)) != count:
        raise _Broken("JPEG with a broken frame header")
    for factors, table in zip(frame[7::3], frame[8::3]):
        if not (1 <= factors >> 4 <= 4 and 1 <= factors & 15 <= 4 and table <= 3):
            raise _Broken("JPEG with a broken frame header")
    return (height, width), names


def _jpeg_quantisation(tables: bytes) -> None:
    at = 0
    while at < len(tables):
        if tables[at] >> 4 > 1 or tables[at] & 15 > 3:
            raise _Broken("JPEG with a broken quantisation table")
        at += 65 + 64 * (tables[at] >> 4)
    if at != len(tables):
        raise _Broken("JPEG with a broken quantisation table")


def _jpeg_huffman(tables: bytes) -> None:
    at = 0
    while at + 17 <= len(tables):
        symbols = sum(tables[at + 1 : at + 17])
        if tables[at] >> 4 > 1 or tables[at] & 15 > 3 or symbols > 256:
            raise _Broken("JPEG with a broken Huffman table")
        at += 17 + symbols
    if at != len(tables):
        raise _Broken("JPEG with a broken Huffman table")


_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _png(data: bytes) -> tuple[int, int]:
    """Walks all chunks to IEND and verifies each checksum."""
    at, size, seen = 8, None, set()
    while True:
        if at + 12 > len(data):
            raise _Broken("PNG cut off")
        length, kind = struct.unpack_from(">I4s", data, at)
        stop = at + 12 + length
        if stop > len(data):
            raise _Broken("PNG cut off")
        if zlib.crc32(memoryview(data)[at + 4 : stop - 4]) != struct.unpack_from(">I", data, stop - 4)[0]:
            raise _Broken("PNG with a wrong checksum")
        if size is None:
            if kind != b"IHDR" or length != 13:
                raise _Broken("PNG without a header")
            width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(
                ">IIBBBBB", data, at + 8
            )
            if depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
                raise _Broken("PNG with a broken header")
            if depth == 16:
                raise _Broken("16-bit PNG is not supported: convert it to 8 bits")
            size = height, width
        elif kind == b"IHDR":
            raise _Broken("PNG with two headers")
        if kind == b"PLTE" and (length == 0 or length % 3 or length > 768):
            raise _Broken("PNG with a broken palette")
        seen.add(kind)
        if kind == b"IEND":
            break
        at = stop
    if b"IDAT" not in seen or (colour == 3 and b"PLTE" not in seen):
        raise _Broken("PNG without picture data")
    return size


def _webp(data: bytes) -> tuple[int, int]:
    stop = 8 + struct.unpack_from("<I", data, 4)[0]
    if stop > len(data):
        raise _Broken("WebP cut off")
    at, canvas = 12, None
    while at + 8 <= stop:
        kind, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > stop:
            raise _Broken("WebP cut off")
        body = data[at + 8 : at + 8 + min(length, 16)]
        if kind == b"VP8X" and at == 12:
            if body[0] & 2:
                raise _Broken("animated WebP is not supported: convert it to PNG or JPEG")
            if length != 10 or body[0] & 0xC1 or any(body[1:4]):
                raise _Broken("WebP with a broken header")
            alpha = bool(body[0] & 16)
            canvas = int.from_bytes(body[7:10], "little") + 1, int.from_bytes(body[4:7], "little") + 1
        elif kind == b"VP8 ":
            if length < 10 or body[0] & 1 or body[3:6] != b"\x9d\x01\x2a":
                raise _Broken("WebP with a broken header")
            width, height = struct.unpack_from("<HH", body, 6)
            return _webp_size(canvas, (height & 0x3FFF, width & 0x3FFF))
        elif kind == b"VP8L":
            if length < 5 or body[0] != 0x2F:
                raise _Broken("WebP with a broken header")
            bits = int.from_bytes(body[1:5], "little")
            return _webp_size(canvas, ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1))
        elif canvas is None or (kind == b"ALPH" and not alpha):
            raise _Broken("WebP with a broken header")
        at += 8 + length + (length & 1)
    raise _Broken("WebP without picture data")


def _webp_size(canvas: tuple[int, int] | None, size: tuple[int, int]) -> tuple[int, int]:
    if canvas is not None and canvas != size:
        raise _Broken("WebP whose header and picture differ in size")
    return size


def _bmp(data: bytes) -> tuple[int, int]:
    offset, header = struct.unpack_from("<II", data, 10)
    if header < 40:
        raise _Broken("BMP of a kind that is not supported")
    width, height, planes, bits, compression, _, _, _, colours = struct.unpack_from("<iiHHIIiiI", data, 18)
    height = abs(height)  # negative: stored from the top down
    if colours > 256 or (bits <= 8 and (colours > 1 << bits or offset < 14 + header + 4 * (colours or 1 << bits))):
        raise _Broken("BMP with a broken palette")
    if planes != 1 or (bits, compression) not in ((1, 0), (4, 0), (8, 0), (24, 0), (32, 0)):
        raise _Broken("BMP of a kind that is not supported")
    if width < 1 or offset < 14 + header or offset + (width * bits + 31) // 32 * 4 * height > len(data):
        raise _Broken("BMP cut off")
    return height, width
