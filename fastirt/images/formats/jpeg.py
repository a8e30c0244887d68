"""JPEG files: a check of their segments without decoding, and their orientation."""

from __future__ import annotations

import struct

import numpy as np

from fastirt.images.formats.structure import Broken, Structure

_PAIR = struct.Struct(">H").unpack_from
_HUFFMAN = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive
_FOR_PILLOW = frozenset((0xC3, 0xC9, 0xCA, 0xCB))  # lossless and arithmetic coding
_HIERARCHICAL = frozenset((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE))
_ARITHMETIC_CONDITIONING = 0xCC


def parse_jpeg(data: bytes) -> Structure:
    """Walk all segments and scans from SOI to EOI (ITU-T T.81, annex B). Raises Broken.

    Decoded by Pillow only (not `plain`): four components, because DALI inverts them even without an
    Adobe marker; three components in RGB; lossless and arithmetic coding.
    """
    at, end, frame, has_tables, adobe_rgb = 2, len(data), None, False, False
    stops: list[int] = []  # ends of scan data, last first; filled at the first scan
    metadata: list[tuple[int, int]] = []
    while True:
        if at + 2 > end:
            raise Broken("JPEG cut off: no end marker" if stops else "JPEG cut off inside its header")
        if data[at] != 0xFF:
            raise Broken(f"JPEG with garbage where a marker should be (byte {at})")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xD9:
            if not stops:
                raise Broken("JPEG without image data")
            return _structure(frame, adobe_rgb, metadata)
        if at + 4 > end:
            raise Broken("JPEG cut off inside its header")
        length = _PAIR(data, at + 2)[0]
        stop = at + 2 + length
        if length < 2 or stop > end:
            raise Broken("JPEG cut off inside its header")
        if marker in _HUFFMAN or marker in _FOR_PILLOW:
            if frame is not None:
                raise Broken("JPEG with two frame headers")
            frame = marker, *_frame(data[at + 4 : stop])
        elif marker == 0xDB:
            _quantization(data[at + 4 : stop])
            has_tables = True
        elif marker == 0xC4:
            _huffman(data[at + 4 : stop])
        elif marker == 0xDA:
            if frame is None or not (has_tables or frame[0] in (0xC3, 0xCB)):
                raise Broken("JPEG without a frame header" if frame is None else "JPEG without quantization tables")
            _scan(data[at + 4 : stop], frame[3])
            stops = stops or _markers(data, stop)
            while stops and stops[-1] < stop:
                stops.pop()
            if not stops:
                raise Broken("JPEG cut off: no end marker")
            if stops[-1] == stop:
                raise Broken("JPEG without image data")
            stop = stops[-1]
        elif marker == 0xE1:
            metadata.append((at, stop))
        elif marker == 0xEE:
            adobe_rgb = data[at + 4 : at + 9] == b"Adobe" and length >= 14 and data[at + 15] == 0
        elif marker in _HIERARCHICAL:
            raise Broken("JPEG with hierarchical coding, which is not supported")
        # Reserved markers, SOI, and restart markers outside a scan.
        elif marker < 0xDC and marker != _ARITHMETIC_CONDITIONING:
            raise Broken(f"JPEG with a stray marker (byte {at})")
        at = stop


def with_orientation(data: bytes, metadata: tuple[tuple[int, int], ...], orientation: int) -> bytes:
    """The JPEG with its `metadata` blocks replaced by an EXIF block with the orientation (1: none).

    So every decoder that honors EXIF turns it equally, however unusual the original blocks are.
    """
    pieces, at = [data[:2]], 2
    if orientation != 1:
        # TIFF header, one directory entry: tag 0x0112, one SHORT.
        exif = b"Exif\0\0" + struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        pieces.append(struct.pack(">HH", 0xFFE1, 2 + len(exif)) + exif)
    for start, stop in metadata:
        pieces.append(data[at:start])
        at = stop
    return b"".join((*pieces, data[at:]))


def _structure(frame: tuple, adobe_rgb: bool, metadata: list[tuple[int, int]]) -> Structure:
    marker, height, width, components = frame
    rgb = len(components) == 3 and (adobe_rgb or bytes(components) == b"RGB")
    plain = marker in _HUFFMAN and len(components) != 4 and not rgb
    return Structure(height, width, plain, tuple(metadata))


def _markers(data: bytes, start: int) -> list[int]:
    """Positions of markers from `start` on, last first, without stuffing and restart markers."""
    body = np.frombuffer(data, np.uint8, offset=start)
    positions = np.flatnonzero(body[:-1] == 0xFF)
    after = body[positions + 1]
    positions = positions[(after != 0) & (after != 0xFF) & ((after < 0xD0) | (after > 0xD7))]
    return (positions[::-1] + start).tolist()


def _scan(scan: bytes, components: list[int]) -> None:
    if not scan or not 1 <= scan[0] <= 4 or len(scan) != 4 + 2 * scan[0]:
        raise Broken("JPEG with a broken scan header")
    if any(name not in components for name in scan[1 : 1 + 2 * scan[0] : 2]):
        raise Broken("JPEG whose scan names a component that it does not have")


def _frame(frame: bytes) -> tuple[int, int, list[int]]:
    """(height, width, names of the components)."""
    precision, height, width, count = struct.unpack_from(">BHHB", frame)
    if precision != 8:
        raise Broken(f"JPEG with {precision} bits per channel, which is not supported: convert it to 8 bits")
    if count not in (1, 3, 4) or len(frame) != 6 + 3 * count:
        raise Broken("JPEG with a broken frame header")
    names = list(frame[6::3])
    if len(set(names)) != count:
        raise Broken("JPEG with a broken frame header")
    for factors, table in zip(frame[7::3], frame[8::3]):
        if not (1 <= factors >> 4 <= 4 and 1 <= factors & 15 <= 4 and table <= 3):
            raise Broken("JPEG with a broken frame header")
    return height, width, names


def _quantization(tables: bytes) -> None:
    at = 0
    while at < len(tables):
        if tables[at] >> 4 > 1 or tables[at] & 15 > 3:
            raise Broken("JPEG with a broken quantization table")
        at += 65 + 64 * (tables[at] >> 4)
    if at != len(tables):
        raise Broken("JPEG with a broken quantization table")


def _huffman(tables: bytes) -> None:
    at = 0
    while at + 17 <= len(tables):
        symbols = sum(tables[at + 1 : at + 17])
        if tables[at] >> 4 > 1 or tables[at] & 15 > 3 or symbols > 256:
            raise Broken("JPEG with a broken Huffman table")
        at += 17 + symbols
    if at != len(tables):
        raise Broken("JPEG with a broken Huffman table")
