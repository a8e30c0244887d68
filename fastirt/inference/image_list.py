"""Images of a user to embed: a folder, a CSV file, a list of files, a packed store, or memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

import numpy as np
from PIL import Image

from fastirt.datasets.folder_scan import Findings, Owners, class_images
from fastirt.datasets.records import Split, printable
from fastirt.errors import UserError
from fastirt.images.packed_format import MAGIC
from fastirt.images.packed_store import PackedSplit, PackedStore
from fastirt.images.source import FileSource, ImageSource
from fastirt.inference.csv_columns import read_csv
from fastirt.inference.memory_source import MemorySource

KINDS = "a folder, a file, a list of files, PIL images, or uint8 arrays of shape (H, W, 3)"


@dataclass(frozen=True)
class ImageList:
    """N images in order.

    Attributes:
        names: N names: paths relative to `root` with forward slashes where there is a root.
        files: N absolute paths; None for each image of a packed store or of memory.
        source: the encoded images.
        place: folder or file that they come from, for messages.
        metadata: further columns of a CSV file or packed store, N texts each.
        root: absolute folder of `names`, or None.
    """

    names: tuple[str, ...]
    files: tuple[Optional[str], ...]
    source: ImageSource
    place: str
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    root: Optional[str] = None

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, images: Any) -> ImageList:
        """The list of whatever `Model.encode` takes.

        images: a folder, a CSV file (.csv, .tsv), a packed store or an image file; a list of paths,
        PIL images or arrays; one PIL image or array; or an ImageList.
        Raises UserError for no images, for other types, and for a list of several types.
        """
        if isinstance(images, cls):
            return images
        if isinstance(images, (str, os.PathLike)):
            return cls.at(os.fspath(images))
        if isinstance(images, Image.Image):
            return cls._in_memory([images])
        if isinstance(images, np.ndarray):
            return cls._in_memory(list(images) if images.ndim == 4 else [images])
        if isinstance(images, (bytes, dict)) or not isinstance(images, Iterable):
            raise UserError(f"images: a {type(images).__name__}: pass {KINDS}")
        listed = list(images)
        kinds = [_kind(image) for image in listed]
        if not listed:
            raise UserError(f"images: an empty list: pass {KINDS}")
        if len(set(kinds)) > 1:
            other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
            raise UserError(
                f"images: the first is a {kinds[0]} and image {other} a {kinds[other]}: pass a list of one type"
            )
        if kinds[0] == "path":
            return cls.from_files([os.fspath(path) for path in listed], "images")
        if kinds[0] not in ("PIL image", "array"):
            raise UserError(f"images: a list of {kinds[0]}: pass {KINDS}")
        return cls._in_memory(listed)

    @classmethod
    def at(cls, path: str) -> ImageList:
        """The images of a folder, CSV file, packed store or image file. Raises UserError."""
        path = os.path.abspath(os.path.expanduser(path))
        if os.path.isdir(path):
            return cls.from_folder(path)
        if not os.path.exists(path):
            raise UserError(f"{path}: no such folder or file: pass {KINDS}")
        if path.lower().endswith((".csv", ".tsv")):
            return cls.from_csv(path)
        if _starts_with(path, MAGIC):
            return cls.from_store(path)
        root = os.path.dirname(path)
        return cls((os.path.basename(path),), (path,), _file_source((path,)), path, root=root)

    @classmethod
    def from_folder(cls, folder: str) -> ImageList:
        """All images in and below a folder, by path; follows links, reads each folder once."""
        findings = Findings(folder)
        files = tuple(image.path for image in class_images(folder, "", Owners([]), findings))
        findings.warn()
        if not files:
            raise UserError(f"{folder}: no image in or below it: pass a folder with images")
        prefix = folder.rstrip(os.sep) + os.sep
        names = tuple(file.removeprefix(prefix).replace(os.sep, "/") for file in files)
        return cls(names, files, _file_source(files), folder, root=folder)

    @classmethod
    def from_csv(cls, file: str) -> ImageList:
        """The images of a CSV file with a column `path`, relative to the file's folder."""
        names, files, metadata = read_csv(Path(file))
        return cls(names, files, _file_source(files), file, metadata, root=os.path.dirname(file))

    @classmethod
    def from_files(cls, paths: Sequence[str], place: str) -> ImageList:
        """Files by name. An unreadable or missing one is reported when it is read."""
        if not paths:
            raise UserError(f"{place}: no file names: pass one image a line")
        files = tuple(os.path.abspath(os.path.expanduser(path)) for path in paths)
        return cls(tuple(paths), files, _file_source(files), place)

    @classmethod
    def from_text(cls, text: str, place: str = "stdin") -> ImageList:
        """One file name a line, or each ended by a NUL byte as `find -print0` writes them."""
        names = text.split("\0") if "\0" in text else [line.rstrip("\r") for line in text.split("\n")]
        return cls.from_files([name for name in names if name], place)

    @classmethod
    def from_store(cls, file: str) -> ImageList:
        """All images of a packed store, with the columns `label` and `split`."""
        store = PackedStore.open(file)
        names = tuple(store.names)
        classes = store.header["class_names"]
        labels = np.asarray(store.index["label"], np.int64)
        splits = [name for name, count in store.header["splits"] for _ in range(count)]
        metadata = {"label": tuple(classes[label] for label in labels.tolist()), "split": tuple(splits)}
        source = PackedSplit(store, Split("all", names, labels), 0)
        return cls(names, (None,) * len(names), source, str(store.path), metadata)

    @classmethod
    def _in_memory(cls, images: Sequence[Any]) -> ImageList:
        source = MemorySource(images)
        names = tuple(source.path(row) for row in range(len(images)))
        if not names:
            raise UserError(f"images: an array of no images: pass {KINDS}")
        return cls(names, (None,) * len(names), source, "images")

    def with_source(self, source: ImageSource) -> ImageList:
        """The same list, read through another source."""
        return dataclasses.replace(self, source=source)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over names and metadata."""
        return _digest([self.names, *self.metadata.values(), tuple(self.metadata)])

    @property
    def files_digest(self) -> str:
        """SHA-256 (hex) over the absolute files; of a packed store, over its own."""
        return _digest([tuple(file or self.place for file in self.files)])


def _digest(columns: Sequence[Sequence[str]]) -> str:
    digest = hashlib.sha256()
    for texts in columns:
        for text in texts:
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(b"\n")
    return digest.hexdigest()


def _kind(image: Any) -> str:
    if isinstance(image, (str, os.PathLike)):
        return "path"
    if isinstance(image, Image.Image):
        return "PIL image"
    return "array" if isinstance(image, np.ndarray) else printable(type(image).__name__)


def _file_source(files: tuple[Optional[str], ...]) -> FileSource:
    source = FileSource([file or "" for file in files])
    if not os.path.isdir(source.root):
        source.root = ""  # files that never were there are unreadable images, no lost folder
    return source


def _starts_with(path: str, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False
