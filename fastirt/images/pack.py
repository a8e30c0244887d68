"""`fastirt pack`: resize every image of a data set once and write all to one packed store.

The loss of encoding again: 150 photos of 348×348 (grocery81) at 256×256, decoded and compared with
the resized pixels, in levels of 255 (without the original's own JPEG loss):

    quality  subsampling   mean abs difference   maximum   KB per image
         90        4:2:0                  2.32        73             21
         95        4:2:0                  1.72        62             30
         95        4:4:4                  1.26        19             37     the default
         98        4:4:4                  0.78        10             52
        100        4:4:4                  0.39         4             82

An upright RGB JPEG of the target size is stored unchanged, without loss. With orientation "exif"
all images are stored upright and without EXIF, so that no reader turns them again.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import BinaryIO, Iterator

import numpy as np
from tqdm import tqdm

from fastirt.atomic import sync_file, sync_folder, try_lock
from fastirt.datasets import Catalog
from fastirt.datasets.digest import catalog_digest, relative_names
from fastirt.errors import UserError
from fastirt.images.formats.packed_image import PackedImage, Recipe, encode_image
from fastirt.images.packed_format import ENTRY, PROLOGUE, write_prologue
from fastirt.images.packed_store import PackedStore

__all__ = ["PackedStore", "pack"]

QUALITY, SUBSAMPLING = 95, "4:4:4"
CHUNK = 16  # images per task of the process pool


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
    """Write all splits of a catalogue to a packed store.

    The file is written as `out`.partial and renamed when complete. It has the same bytes for any
    number of workers. Unreadable images are recorded in the store and logged; they stop nothing.

    Args:
        catalog: the data set, from `load_dataset`.
        out: file to write.
        resize: "square" (resize_size × resize_size) or "shorter" (the shorter side).
        resize_size: pixels, 1 to 4096.
        quality: JPEG quality, 1 to 100.
        subsampling: JPEG chroma, "4:4:4", "4:2:2" or "4:2:0".
        orientation: "exif" turns images upright, "stored" leaves them as they are.
        workers: number of processes; None: one per usable core.
        progress: show a progress bar.

    Returns:
        The absolute path of the store; `PackedStore.open` reads it.

    Raises:
        UserError: an option is out of range, no image is readable, another process writes the same
            file, or the file cannot be written.
    """
    recipe = Recipe(orientation, resize, resize_size, quality, subsampling)
    out = Path(os.path.abspath(os.path.expanduser(out)))
    if out.is_dir():
        raise UserError(f"{out}: is a folder: pass the name of a file, such as {out / 'store.pack'}")
    unfinished = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
            if not try_lock(file):
                raise UserError(f"{unfinished}: another process is writing it: wait for it or choose another name")
            try:
                sections = _write_body(catalog, file, recipe, workers or len(os.sched_getaffinity(0)), progress)
                size = file.tell()
                sync_file(file)
                file.seek(0)
                file.write(write_prologue(size, sections))
                sync_file(file)
                os.replace(unfinished, out)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        sync_folder(out.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out}: cannot be written ({reason}): choose another place or free disk space") from None
    return out


def _write_body(
    catalog: Catalog, file: BinaryIO, recipe: Recipe, workers: int, progress: bool
) -> list[tuple[int, int, int]]:
    """Write all but the prologue, left as zeros; returns (offset, length, CRC32) per section."""
    file.truncate(0)
    file.write(bytes(PROLOGUE.size))
    paths = [path for split in catalog.splits() for path in split.paths]
    index = np.zeros(len(paths), dtype=ENTRY)
    index["label"] = np.concatenate([split.labels for split in catalog.splits()])
    bad = []
    offset = PROLOGUE.size
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    with closing(_packed(paths, recipe, workers)) as all_packed:
        bar = tqdm(all_packed, total=len(paths), desc="pack", unit="img", mininterval=interval, disable=not progress)
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
        raise UserError(f"{catalog.root}: none of the {len(paths):,} images could be read, the first is {paths[0]}")
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


def _packed(paths: list[str], recipe: Recipe, workers: int) -> Iterator[PackedImage]:
    """The images in order, from a process pool with a bounded number of tasks ahead."""
    if workers <= 1 or len(paths) <= CHUNK:
        yield from (encode_image(path, recipe) for path in paths)
        return
    # Spawned: forking a process that has threads (DALI, CUDA) may deadlock.
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
        raise UserError(
            f"pack: a worker process died (out of memory?) near {paths[done]}: use fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool


def _encode_all(paths: list[str], recipe: Recipe) -> list[PackedImage]:
    return [encode_image(path, recipe) for path in paths]
