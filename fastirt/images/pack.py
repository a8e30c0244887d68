"""`fastirt pack`: resize every image of a data set once and write them as one packed store.

What re-encoding costs: 150 photos of 348×348 (grocery81) at 256×256, decoded again and compared with the resized
pixels, in levels of 255 (the JPEG of the original is another loss that both ways of reading share):

    quality  subsampling   mean abs difference   maximum   KB an image
         90        4:2:0                  2.32        73             21
         95        4:2:0                  1.72        62             30
         95        4:4:4                  1.26        19             37     the default
         98        4:4:4                  0.78        10             52
        100        4:4:4                  0.39         4             82

An RGB JPEG that has its target size already, and lies upright, is stored as it is, without any loss. With orientation "exif" all
images are stored upright and without EXIF, so that reading never turns them again.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import multiprocessing
import os
import signal
import sys
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastirt.datasets import Catalog
from fastirt.datasets.digest import catalog_digest, relative_names, source_stat
from fastirt.errors import UserError
from fastirt.images.formats.header_check import MAX_BYTES, MAX_PIXELS, MAX_SIDE, BadImage, inspect
from fastirt.images.formats.jpeg import with_orientation
from fastirt.images.formats.pillow import open_image, orientation_of, rgb, upright_size
from fastirt.images.formats.structure import Broken, Structure
from fastirt.images.packed_store import ENTRY, PROLOGUE, PackedStore, write_prologue
from fastirt.images.resize_crop import check_shape, resized_size

__all__ = ["PackedStore", "pack"]

QUALITY, SUBSAMPLING = 95, "4:4:4"
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
CHUNK = 16  # images per task of the process pool


@dataclass(frozen=True)
class Packed:
    """One image on its way from a worker to the file; `reason` instead of data for a bad one."""

    data: bytes
    height: int
    width: int
    source_size: int
    source_mtime: int
    source_crc: int
    reason: str = ""


@dataclass(frozen=True)
class Recipe:
    """How images are turned, resized and encoded."""

    orientation: str  # "exif": upright; "stored": as they are
    resize: str  # "square": resize_size × resize_size; "shorter": the shorter side
    resize_size: int
    quality: int
    subsampling: str


def pack(
    catalog: Catalog,
    out: str | Path,
    *,
    resize: str = "square",
    resize_size: int = 256,
    quality: int = QUALITY,
    subsampling: str = SUBSAMPLING,
    orientation: str = "stored",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Writes all splits of the catalogue to the packed store `out` and returns its path.

    The file appears under its name only when it is complete (written beside it as `out`.partial, then renamed), and
    has the same bytes under any number of workers (processes; None: one a core). Images that cannot be read are recorded in the store, named in a
    warning, and never stop the packing. Raises UserError on options out of range and when the file cannot be written.
    """
    recipe = _recipe(orientation, resize, resize_size, quality, subsampling)
    out = Path(os.path.abspath(os.path.expanduser(out)))
    if out.is_dir():
        raise UserError(f"{out}: is a folder: give the name of the file to write, such as {out / 'store.pack'}")
    unfinished = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(unfinished, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            _lock(file, unfinished)
            try:
                sections = _write_body(catalog, file, recipe, workers or len(os.sched_getaffinity(0)), progress)
                size = file.tell()
                _sync(file)
                file.seek(0)
                file.write(write_prologue(size, sections))
                _sync(file)
                os.replace(unfinished, out)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        folder = os.open(out.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out}: cannot be written ({reason}): choose another place or make room") from None
    return out


def _write_body(
    catalog: Catalog, file: BinaryIO, recipe: Recipe, workers: int, progress: bool
) -> list[tuple[int, int, int]]:
    """Everything but the prologue, whose room is left as zeros; returns (offset, length, CRC32) of the sections."""
    file.truncate(0)
    file.write(bytes(PROLOGUE.size))
    paths = [path for split in catalog.splits() for path in split.paths]
    index = np.zeros(len(paths), dtype=ENTRY)
    index["label"] = np.concatenate([split.labels for split in catalog.splits()])
    bad = []
    offset = PROLOGUE.size
    often = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    with closing(_packed(paths, recipe, workers)) as all_packed:
        bar = tqdm(all_packed, total=len(paths), desc="pack", unit="img", mininterval=often, disable=not progress)
        for row, packed in enumerate(bar):
            index[row] = (
                offset,
                len(packed.data),
                zlib.crc32(packed.data),
                index["label"][row],
                packed.height,
                packed.width,
                packed.source_size,
                packed.source_mtime,
                packed.source_crc,
            )
            file.write(packed.data)
            offset += len(packed.data)
            if packed.reason:
                bad.append([row, packed.reason])
                logging.getLogger("fastirt").warning(f"bad image {paths[row]}: {packed.reason}")
    if len(bad) == len(paths):
        raise UserError(f"{catalog.root}: none of the {len(paths):,} images could be read: the first is {paths[0]}")
    header = {
        "dataset": catalog.dataset,
        "splits": [[split.name, len(split)] for split in catalog.splits()],
        "catalog_sha256": catalog_digest(catalog),
        "orientation": recipe.orientation,
        "resize": recipe.resize,
        "resize_size": recipe.resize_size,
        "quality": recipe.quality,
        "subsampling": recipe.subsampling,
        "bad": bad,
        "class_names": catalog.class_names,
    }
    names = b"".join(os.fsencode(n) + b"\0" for split in catalog.splits() for n in relative_names(catalog, split))
    sections = []
    for section in (index.tobytes(), names, json.dumps(header).encode()):
        sections.append((offset, len(section), zlib.crc32(section)))
        file.write(section)
        offset += len(section)
    return sections


def _packed(paths: list[str], recipe: Recipe, workers: int) -> Iterator[Packed]:
    """The images in order; a process pool keeps a bounded number of tasks ahead."""
    if workers <= 1 or len(paths) <= CHUNK:
        yield from (_encode(path, recipe) for path in paths)
        return
    # Not forked: a fork of a process with threads (DALI, CUDA) may deadlock.
    context = multiprocessing.get_context("spawn")
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    pool = ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context, initializer=_ignore_interrupt)
    tasks: deque = deque()
    try:
        ahead = iter(chunks)
        done = 0
        while done < len(paths):
            while len(tasks) < 4 * workers and (chunk := next(ahead, None)) is not None:
                tasks.append(pool.submit(_encode_all, chunk, recipe))
            for packed in tasks.popleft().result():
                done += 1
                yield packed
    except BrokenProcessPool:
        raise UserError(f"pack: a worker process died (memory?), near {paths[done]}: use fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool


def _encode_all(paths: list[str], recipe: Recipe) -> list[Packed]:
    return [_encode(path, recipe) for path in paths]


def _encode(path: str, recipe: Recipe) -> Packed:
    """One file, checked, resized and encoded; never raises on a bad image."""
    size, modified = source_stat(path)
    source_crc = 0
    try:
        if size > MAX_BYTES:
            raise BadImage(path, f"{size:,} bytes, the limit is {MAX_BYTES:,}")
        encoded = Path(path).read_bytes()
        source_crc = zlib.crc32(encoded)
        data, height, width = _resize(encoded, inspect(encoded, path), recipe)
        return Packed(data, height, width, size, modified, source_crc)
    except BadImage as bad:
        reason = bad.reason
    except Broken as broken:
        reason = str(broken)
    except Exception as error:  # Pillow raises nearly anything on a broken file
        reason = f"{type(error).__name__}: {error}"
    return Packed(b"", 0, 0, size, modified, source_crc, " ".join(reason.split())[:200] or "unreadable")


def _resize(encoded: bytes, structure: Structure, recipe: Recipe) -> tuple[bytes, int, int]:
    """(JPEG, height, width), by Pillow: upright and RGB first, then bicubic with antialias, as torchvision does."""
    with open_image(encoded) as image:
        check_shape(image.height, image.width, recipe.resize)
        height, width = resized_size(*upright_size(image, recipe.orientation), recipe.resize, recipe.resize_size)
        if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
            raise ValueError(f"{image.width}x{image.height} would become {width}x{height} pixels")
        unchanged = structure.plain and (image.format, image.mode, image.size) == ("JPEG", "RGB", (width, height))
        pixels = rgb(image, recipe.orientation)  # decodes all of it
        is_upright = recipe.orientation == "exif" and orientation_of(image) == 1
    if unchanged and recipe.orientation == "stored":
        return encoded, height, width
    if unchanged and is_upright:
        return with_orientation(encoded, structure.metadata, 1), height, width
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(out, "JPEG", quality=recipe.quality, subsampling=recipe.subsampling)
    return out.getvalue(), height, width


def _recipe(orientation: str, resize: str, resize_size: int, quality: int, subsampling: str) -> Recipe:
    for flag, value, good in (
        ("--orientation", orientation, orientation in ("exif", "stored")),
        ("--resize", resize, resize in ("square", "shorter")),
        ("--resize-size", resize_size, 1 <= resize_size <= 4096),
        ("--quality", quality, 1 <= quality <= 100),
        ("--subsampling", subsampling, subsampling in SUBSAMPLINGS),
    ):
        if not good:
            raise UserError(
                f"{flag} {value}: out of range: orientation is exif or stored, resize is square or shorter, its size 1 to 4096, "
                f"quality 1 to 100, subsampling {', '.join(SUBSAMPLINGS)}"
            )
    return Recipe(orientation, resize, resize_size, quality, subsampling)


def _lock(file: BinaryIO, name: Path) -> None:
    """Two processes that pack to the same name must not write into one file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise UserError(f"{name}: another process is writing it: wait for it or choose another name")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
