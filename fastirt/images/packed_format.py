"""The file format of packed stores.

    prologue   96 bytes: magic, format version, file size, then (offset, length, CRC32) of the
               sections index, names and header, and its own CRC32
    images     JPEG files in catalogue order: train, query (or test), gallery
    index      one ENTRY per image
    names      relative paths, each ended by a NUL byte
    header     JSON: data set and options of the store

All integers are little-endian. The prologue is written last, so an unfinished file has none.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from pathlib import Path

import numpy as np

from fastirt.errors import UserError

MAGIC = b"fastirt\x89"
VERSION = 1
PROLOGUE = struct.Struct("<8sIQQQIQQIQQII4x")
SECTIONS = ("index", "names", "header")
ENTRY = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),  # bytes; 0: the source was unreadable
        ("crc", "<u4"),
        ("label", "<i4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("source_size", "<i8"),  # bytes
        ("source_mtime", "<i8"),  # nanoseconds
        ("source_crc", "<u4"),
    ]
)
REPACK_HINT = "make it again with `fastirt pack`"


def write_prologue(size: int, sections: list[tuple[int, int, int]]) -> bytes:
    """The prologue for a file of `size` bytes; sections: (offset, length, CRC32) as in SECTIONS."""
    body = PROLOGUE.pack(MAGIC, VERSION, size, *(value for section in sections for value in section), 0)
    return body[:-8] + struct.pack("<I4x", zlib.crc32(body[:-8]))


def read_prologue(path: Path, mapped: bytes | mmap.mmap) -> list[tuple[int, int, int]]:
    """(offset, length, CRC32) of each of SECTIONS. Raises UserError for an unusable file."""
    head = mapped[: PROLOGUE.size]
    if head == bytes(len(head)):
        raise UserError(f"{path}: half-written or empty: {REPACK_HINT}")
    if head[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: not a packed store: {REPACK_HINT}, or leave --packed out")
    version = int.from_bytes(head[8:12], "little")
    if version != VERSION:
        raise UserError(f"{path}: format version {version}, this fastirt reads {VERSION}: {REPACK_HINT}")
    if len(head) < PROLOGUE.size:
        raise UserError(f"{path}: truncated after {len(mapped):,} bytes: {REPACK_HINT}")
    _, _, size, *sections, crc = PROLOGUE.unpack(head)
    if zlib.crc32(head[:-8]) != crc:
        raise UserError(f"{path}: its first {PROLOGUE.size} bytes are corrupt (checksum): {REPACK_HINT}")
    if size != len(mapped):
        raise UserError(f"{path}: truncated or overwritten: {len(mapped):,} bytes, should be {size:,}: {REPACK_HINT}")
    return [tuple(sections[i : i + 3]) for i in range(0, 9, 3)]
