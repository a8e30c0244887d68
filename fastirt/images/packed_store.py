"""The packed store: all images of a data set, resized once, in one memory-mapped file.

    prologue   96 bytes: magic, format version, file size, then (offset, length, CRC32) of the
               sections index, names and header, and its own CRC32
    images     JPEG files in catalogue order: train, query (or test), gallery
    index      one ENTRY per image
    names      relative paths, each ended by a NUL byte
    header     JSON: data set and options of the store

All integers are little-endian. The prologue is written last, so an unfinished file has none.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastirt.datasets import Catalog, Split
from fastirt.datasets.digest import catalog_digest, relative_names, source_stat
from fastirt.errors import UserError
from fastirt.images.formats.header_check import BadImage

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
MAX_CHECKSUMS = 64  # sources that `check` reads in full if only modification times differ


class PackedStore:
    """A packed store, opened for reading by any number of threads.

    Attributes:
        path: the file.
        header: data set, splits, class names and options of the store.
        index: (N,) ENTRY, one per image.
        names: N paths relative to the data set's folder.
        bad: row to reason for images that were unreadable.
    """

    def __init__(self, path: Path, data: np.ndarray, index: np.ndarray, names: list[str], header: dict[str, Any]):
        self.path = path
        self.header = header
        self.index = index
        self.names = names
        self.bad = {int(row): reason for row, reason in header["bad"]}
        self._data = data

    @classmethod
    def open(cls, path: str | Path) -> PackedStore:
        """Map the file and verify all but the images, which `PackedSplit.read` verifies.

        Raises UserError for a file that is missing, corrupt, unfinished, truncated, of another
        version or no packed store.
        """
        path = Path(os.path.abspath(os.path.expanduser(path)))
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {REPACK_HINT}") from None
        sections = _read_prologue(path, mapped)
        parts = {}
        for name, (offset, length, crc) in zip(SECTIONS, sections):
            parts[name] = mapped[offset : offset + length]
            if len(parts[name]) != length or zlib.crc32(parts[name]) != crc:
                raise UserError(f"{path}: its {name} is corrupt (checksum): {REPACK_HINT}")
        index = np.frombuffer(parts["index"], dtype=ENTRY)
        names = [os.fsdecode(name) for name in parts["names"].split(b"\0")[:-1]]
        return cls(path, np.frombuffer(mapped, dtype=np.uint8), index, names, json.loads(parts["header"]))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def orientation(self) -> str:
        """ "exif" or "stored"; older stores do not name it."""
        return self.header.get("orientation", "stored")

    def check(self, catalog: Catalog, resize: str, resize_size: int, orientation: str = "stored") -> None:
        """Check that the store fits a catalogue and options, and that its sources are unchanged.

        A changed size is an error; where only modification times differ, checksums of up to
        MAX_CHECKSUMS files decide.

        Raises:
            UserError: the store does not fit; the message names the first difference.
        """
        self.check_options(resize, resize_size, orientation, catalog.dataset)
        if self.header["catalog_sha256"] != catalog_digest(catalog):
            raise UserError(f"{self.path}: stale or foreign: {self._difference(catalog)}: {REPACK_HINT}")
        self._check_sources([path for split in catalog.splits() for path in split.paths])

    def split(self, split: Split) -> PackedSplit:
        """The image source of a split. Raises UserError if the store's split has other images."""
        start = 0
        for name, count in self.header["splits"]:
            if name == split.name:
                break
            start += count
        else:
            raise UserError(f"{self.path}: has no split {split.name}: {REPACK_HINT}")
        tails = (
            name[name.rfind("../") + 3 :] if name.startswith("../") else name
            for name in self.names[start : start + count]
        )
        if (
            count != len(split)
            or not np.array_equal(self.index["label"][start : start + count], split.labels)
            or not all(path.endswith(tail) for path, tail in zip(split.paths, tails))
        ):
            raise UserError(f"{self.path}: its split {name} holds other images than the data set's: {REPACK_HINT}")
        return PackedSplit(self, split, start)

    def check_options(self, resize: str, resize_size: int, orientation: str, dataset: str | None = None) -> None:
        """Raises UserError for images resized or turned in another way, or of another data set."""
        for option, stored, wanted in (
            ("data set", self.header["dataset"], dataset or self.header["dataset"]),
            ("--resize", self.header["resize"], resize),
            ("--resize-size", self.header["resize_size"], resize_size),
            ("--orientation", self.orientation, orientation),
        ):
            if stored != wanted:
                raise UserError(
                    f"{self.path}: stale or foreign: {option} is {stored} in the store and {wanted} in this run: "
                    f"make it again with `fastirt pack --resize {resize} --resize-size {resize_size} "
                    f"--orientation {orientation}`"
                )

    def _difference(self, catalog: Catalog) -> str:
        """The first difference between the catalogue and the one the store was made from."""
        splits = [[split.name, len(split)] for split in catalog.splits()]
        if splits != self.header["splits"]:
            stored, listed = (", ".join(f"{n} {name}" for name, n in s) for s in (self.header["splits"], splits))
            return f"the store has {stored} images, the data set {listed}"
        row = 0
        for split in catalog.splits():
            for path, label in zip(relative_names(catalog, split), split.labels):
                stored_name, stored_class = self.names[row], self.header["class_names"][self.index["label"][row]]
                if (stored_name, stored_class) != (path, catalog.class_names[label]):
                    return (
                        f"the store has '{stored_name}' of class '{stored_class}' "
                        f"where the data set has '{path}' of class '{catalog.class_names[label]}'"
                    )
                row += 1
        return "its class list differs"

    def _check_sources(self, paths: list[str]) -> None:
        changed = []
        for row, path in enumerate(paths):
            size, modified = source_stat(path)
            if size != self.index["source_size"][row]:
                raise UserError(
                    f"{self.path}: stale: {path} has {size:,} bytes, it had "
                    f"{self.index['source_size'][row]:,} when it was packed: {REPACK_HINT}"
                )
            if modified != self.index["source_mtime"][row]:
                changed.append(row)
        # A copied data set has new times and equal bytes, an edited image other bytes.
        for row in changed[:: max(1, -(-len(changed) // MAX_CHECKSUMS))]:
            try:
                crc = zlib.crc32(Path(paths[row]).read_bytes())
            except OSError:
                crc = 0
            if crc != self.index["source_crc"][row]:
                raise UserError(f"{self.path}: stale: {paths[row]} has changed since it was packed: {REPACK_HINT}")


class PackedSplit:
    """The images of one split of a packed store, an `ImageSource`."""

    def __init__(self, store: PackedStore, split: Split, start: int):
        self.store, self._split, self._start = store, split, start
        self.orientation = store.orientation

    def __len__(self) -> int:
        return len(self._split)

    def path(self, row: int) -> str:
        """The source file of the image."""
        return self._split.paths[row]

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) in pixels, as stored; (0, 0) for a bad image."""
        entry = self.store.index[self._start + row]
        return int(entry["height"]), int(entry["width"])

    def read(self, row: int) -> np.ndarray:
        """(length,) uint8, the JPEG as a read-only view of the file.

        Raises BadImage for a wrong checksum and for an image that was unreadable when packed.
        """
        entry = self.store.index[self._start + row]
        length = int(entry["length"])
        if length == 0:
            raise BadImage(self.path(row), self.store.bad.get(self._start + row, "could not be packed"))
        offset = int(entry["offset"])
        data = self.store._data[offset : offset + length]
        if len(data) != length or zlib.crc32(data) != entry["crc"]:
            raise BadImage(self.path(row), f"wrong checksum in {self.store.path}")
        return data


def write_prologue(size: int, sections: list[tuple[int, int, int]]) -> bytes:
    """The prologue for a file of `size` bytes; sections: (offset, length, CRC32) as in SECTIONS."""
    body = PROLOGUE.pack(MAGIC, VERSION, size, *(value for section in sections for value in section), 0)
    return body[:-8] + struct.pack("<I4x", zlib.crc32(body[:-8]))


def _read_prologue(path: Path, mapped: bytes | mmap.mmap) -> list[tuple[int, int, int]]:
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
