"""The folder of a gallery: its manifest, generations of files, digests, and the writer's lock.

    gallery.json          the manifest: everything below by name, with bytes and SHA-256
    model-1.safetensors   weights and preprocessing, as `Model.save` writes them
    vectors-1.npy         (N, D) float32, of generation 1
    list-1.safetensors    paths and metadata
    removed-3.npy         (N,) bool: rows that were removed
    index-3.faiss         with `--kind`
    lock                  held by the process that writes

A change writes files under new names and then renames a new manifest into place. So a crash at any
moment leaves the old state or the new one, and a reader keeps what it has opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from fastirt.atomic import atomic_write, sync_file, sync_folder, try_lock
from fastirt.datasets.digest import file_digest
from fastirt.errors import UserError

MANIFEST, LOCK = "gallery.json", "lock"
LANCE = "lance"  # folder of the lancedb store
FORMAT = "fastirt gallery"
VERSION = 1
GENERATIONS = r"(vectors|list|removed|index|model)-\d+\.(npy|safetensors|faiss)"
OWN_FILES = re.compile(GENERATIONS + r"|lock|lance|\..*\.tmp")
ENTRIES = {"generation", "built", "dim", "model", "store", "files"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError that names the folder where it is no whole gallery."""
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except NotADirectoryError:
        raise UserError(f"{folder}: not a folder, so not a gallery (make one with fastirt index)")
    except FileNotFoundError:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such gallery (make one with fastirt index)")
        if is_half_written(folder):
            raise UserError(f"{folder}: a gallery that was never finished, without {MANIFEST}: run fastirt index again")
        raise UserError(f"{folder}: not a gallery, it has no {MANIFEST} (make one with fastirt index)")
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a gallery's manifest (not text)")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}")
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise KeyError
        if manifest["version"] > VERSION:
            raise UserError(f"{folder}: a gallery of a newer version of fastirt (format {manifest['version']})")
        if ENTRIES - manifest.keys() or digest_of(manifest) != manifest["digest"]:
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged, or not a gallery's manifest: copy the folder again or index into a new one")
    return manifest


def digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything in the manifest but its own digest."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The moment at which a change happens: files that it names must be on disk before."""
    manifest = {**manifest, "format": FORMAT, "version": VERSION}
    manifest["digest"] = digest_of(manifest)
    sync_folder(folder)
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def is_half_written(folder: Path) -> bool:
    """Whether a writer was killed here before its first manifest.

    Its lock is there first: without it, `lance` or a file of such a name may be a stranger's.
    """
    names = [entry.name for entry in folder.iterdir()]
    return LOCK in names and all(OWN_FILES.fullmatch(name) for name in names)


def check_may_build(folder: Path) -> None:
    """Raises UserError unless the folder is absent, empty, a gallery or a half-written one."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: a file: name a new folder for the gallery")
    names = {entry.name for entry in folder.iterdir()}
    if MANIFEST in names:
        read_manifest(folder)
    elif names and not is_half_written(folder):
        raise UserError(f"{folder}: holds other files and no gallery: name a new or empty folder")


def describe(file: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is written to disk first."""
    with open(file, "rb") as opened:
        sync_file(opened)
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def check_files(folder: Path, files: dict[str, dict[str, Any]], digests: bool) -> None:
    """Raises UserError for a file that differs from the manifest in size or, if asked, in digest.

    Raises FileNotFoundError for an absent one: a writer may just have replaced it.
    """

    def check(name: str) -> None:
        expected, size = files[name], (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise UserError(
                f"{folder / name}: {size:,} bytes in place of {expected['bytes']:,}: damaged; "
                "copy the folder again or run fastirt index again"
            )
        if digests and file_digest(folder / name) != expected["sha256"]:
            raise UserError(
                f"{folder / name}: changed since it was written (its SHA-256 is another): "
                "copy the folder again or run fastirt index again"
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, files))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the writer's lock of a gallery; raises UserError if another writer holds it."""
    with open(folder / LOCK, "a") as file:
        try:
            locked = try_lock(file)
        except OSError as error:
            raise UserError(f"{folder}: its file system has no locks, which writing needs ({error.strerror})")
        if not locked:
            raise UserError(f"{folder}: another process is changing this gallery: try again when it has finished")
        yield


def delete_unused(folder: Path, manifest: dict[str, Any]) -> None:
    """Delete files of earlier generations and of killed writers; call with the lock held."""
    for file in folder.iterdir():
        if OWN_FILES.fullmatch(file.name) and file.is_file() and file.name not in {*manifest["files"], LOCK}:
            file.unlink(missing_ok=True)


def delete_half_written(folder: Path) -> None:
    """Delete what a failed first build has written; other files stay."""
    for file in folder.iterdir():
        if file.name == LANCE:
            shutil.rmtree(file, ignore_errors=True)
        elif OWN_FILES.fullmatch(file.name):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class VectorFile:
    """Writes an .npy file of (N, D) float32 row by row, without N being known before."""

    def __init__(self, file: Path, dim: int) -> None:
        self.dim, self.rows, self.opened = dim, 0, open(file, "wb")
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for the number of rows to grow, so its length stays.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.dim)}
        np.lib.format.write_array_header_1_0(self.opened, header)

    def append(self, vectors: np.ndarray) -> None:
        self.opened.write(np.ascontiguousarray(vectors, "<f4").data)
        self.rows += len(vectors)

    def close(self) -> None:
        self.opened.seek(0)
        self._header()
        self.opened.close()
