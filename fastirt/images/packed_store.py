"""The packed store: all images of a data set, resized once, in one memory-mapped file."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastirt.config.options import InputConfig
from fastirt.datasets import Catalog, Split
from fastirt.datasets.digest import catalog_digest, relative_names, source_stat
from fastirt.errors import UserError
from fastirt.images.formats.header_check import BadImage
from fastirt.images.packed_format import ENTRY, REPACK_HINT, SECTIONS, read_prologue

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
        sections = read_prologue(path, mapped)
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


def packed_sources(path: str | None, catalog: Catalog, input: InputConfig) -> dict[str, PackedSplit] | None:
    """The image sources of all splits in the store that --packed names; None without one.

    Raises UserError where the store does not fit the data set or the preprocessing.
    """
    if path is None:
        return None
    store = PackedStore.open(path)
    store.check(catalog, input.resize, input.resize_size, input.orientation)
    return {split.name: store.split(split) for split in catalog.splits()}


class PackedSplit:
    """The images of one split of a packed store, an `ImageSource`."""

    def __init__(self, store: PackedStore, split: Split, start: int = 0, rows: np.ndarray | None = None):
        """rows: of the store; None: those from `start` on."""
        self.store, self._split, self.orientation = store, split, store.orientation
        self._rows = np.arange(start, start + len(split)) if rows is None else rows

    def part(self, split: Split, rows: np.ndarray) -> PackedSplit:
        """`rows` of these images, which are those of `split`."""
        return PackedSplit(self.store, split, rows=self._rows[rows])

    def __len__(self) -> int:
        return len(self._split)

    def path(self, row: int) -> str:
        """The source file of the image."""
        return self._split.paths[row]

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) in pixels, as stored; (0, 0) for a bad image."""
        entry = self.store.index[self._rows[row]]
        return int(entry["height"]), int(entry["width"])

    def read(self, row: int) -> np.ndarray:
        """(length,) uint8, the JPEG as a read-only view of the file.

        Raises BadImage for a wrong checksum and for an image that was unreadable when packed.
        """
        stored = self._rows[row]
        entry = self.store.index[stored]
        length = int(entry["length"])
        if length == 0:
            raise BadImage(self.path(row), self.store.bad.get(int(stored), "could not be packed"))
        offset = int(entry["offset"])
        data = self.store._data[offset : offset + length]
        if len(data) != length or zlib.crc32(data) != entry["crc"]:
            raise BadImage(self.path(row), f"wrong checksum in {self.store.path}")
        return data
