"""Vectors while they are computed: the hidden folder `.OUT.part` beside OUT.

    vectors.npy     (N, D), of its final size from the start; rows that are not committed hold zeros
    sizes.npy       (N, 2) int32 width and height
    state.json      digests and options of the work; batches and unreadable rows of earlier starts
    log-RANK.jsonl  a line a commit: batches that are on disk, and unreadable rows with the reason
    lock            held by the process that writes

A batch counts as done once its line is written, which happens after its vectors are on disk. So
a killed process loses what it computed since its last commit, and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, Optional

import numpy as np

from fastirt.atomic import atomic_write, try_lock
from fastirt.errors import UserError

COMMIT_SECONDS = 5.0
DTYPES = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}


class PartialVectors:
    """The folder of unfinished vectors, opened by one rank.

    Attributes:
        done: numbers of the batches that were done before.
        bad: unreadable row to reason, of all ranks after `merge`.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        state = json.loads((folder / "state.json").read_text())
        self.done = set(state["done"])
        self.bad: dict[int, str] = {int(row): reason for row, reason in state["bad"]}
        self.vectors_file, self.sizes_file = folder / "vectors.npy", folder / "sizes.npy"
        self.sizes = np.load(self.sizes_file, mmap_mode="r+", allow_pickle=False)
        vectors = np.load(self.vectors_file, mmap_mode="r", allow_pickle=False)
        self._dtype, self._row_bytes, self._start = vectors.dtype, vectors[:1].nbytes, vectors.offset
        # Written by `pwrite`: a disk that fills up is an error, where a memory map would crash.
        self._file = open(self.vectors_file, "r+b", buffering=0)
        self._log = open(folder / f"log-{rank}.jsonl", "ab", buffering=0)
        self._new_batches: list[int] = []
        self._new_bad: list[tuple[int, str]] = []
        self._lock = threading.Lock()
        self._committed = time.monotonic()

    @classmethod
    def begin(cls, folder: Path, work: dict[str, Any], dim: int, overwrite: bool) -> Any:
        """Make the folder, or take it up where the same work was killed.

        Returns its lock, to be held. Only rank 0 calls this.

        Args:
            folder: `.OUT.part`.
            work: what decides the vectors; a folder of other work is refused.
            dim: D.
            overwrite: start over in place of other work.

        Raises:
            UserError: another process writes here, the folder is of other work, the disk is full.
        """
        try:
            folder.mkdir(exist_ok=True)
            lock = open(folder / "lock", "w")
            is_free = try_lock(lock)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made and locked ({error.strerror}): choose another OUT") from None
        if not is_free:
            raise UserError(f"{folder}: another process writes there: wait for it, or choose another OUT")
        state = _read_state(folder)
        if state is not None and state["work"] != work:
            if not overwrite:
                raise UserError(f"{folder}: {_difference(state['work'], work)}: pass --overwrite to start over")
            state = None
        if state is None or not (folder / "vectors.npy").exists():  # its vectors have become OUT
            for old in (folder / "state.json", *folder.glob("log-*.jsonl")):
                old.unlink(missing_ok=True)
            _allocate(folder / "vectors.npy", (work["count"], dim), DTYPES[work["dtype"]])
            _allocate(folder / "sizes.npy", (work["count"], 2), np.dtype("<i4"))
            state = {"work": work, "done": [], "bad": []}
        done, bad = set(state["done"]), {int(row): reason for row, reason in state["bad"]}
        logs = sorted(folder.glob("log-*.jsonl"))
        for batches, rows in map(_read_log, logs):
            done |= batches
            bad.update(rows)
        _write_state(folder, work, done, bad)
        for log in logs:
            log.unlink()
        return lock

    def write(self, batch: int, first: int, vectors: np.ndarray) -> None:
        """Write the rows of a batch from `first` on; commits every few seconds."""
        data = memoryview(np.ascontiguousarray(vectors, self._dtype)).cast("B")
        place = self._start + first * self._row_bytes
        while data:
            written = os.pwrite(self._file.fileno(), data, place)
            data, place = data[written:], place + written
        self._new_batches.append(batch)
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def add_bad(self, row: int, reason: str) -> None:
        """For any thread: on a GPU the loader's finds them."""
        with self._lock:
            self.bad[row] = reason
            self._new_bad.append((row, reason))

    def commit(self) -> None:
        """Write what was computed to disk, then a line that says so."""
        os.fsync(self._file.fileno())
        self.sizes.flush()
        with self._lock:
            bad, self._new_bad = self._new_bad, []
        line = json.dumps({"batches": self._new_batches, "bad": bad}) + "\n"
        self._log.write(line.encode())
        os.fsync(self._log.fileno())
        self._new_batches = []
        self._committed = time.monotonic()

    def close(self) -> None:
        self._file.close()
        self._log.close()

    def merge(self) -> None:
        """Take over the unreadable rows of all ranks, after all have committed."""
        for _, rows in map(_read_log, self.folder.glob("log-*.jsonl")):
            self.bad.update(rows)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _allocate(path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """A .npy file of zeros whose space on disk is reserved. Raises UserError for a full disk."""
    path.unlink(missing_ok=True)  # a rank of a killed work may still write to the old file
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        size = shape[0] * shape[1] * dtype.itemsize
        try:
            os.posix_fallocate(file.fileno(), file.tell(), size)
        except OSError as error:
            raise UserError(
                f"{path}: {size / 1e6:,.0f} MB cannot be reserved ({error.strerror}): free space, or choose another OUT"
            ) from None


def _read_state(folder: Path) -> Optional[dict[str, Any]]:
    """None where there is none; it is written atomically, after the arrays exist."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        state = None
    if not isinstance(state, dict) or not {"work", "done", "bad"} <= state.keys():
        raise UserError(f"{folder}: not begun by `fastirt embed`: remove the folder, or choose another OUT")
    return state


def _write_state(folder: Path, work: dict[str, Any], done: set[int], bad: dict[int, str]) -> None:
    state = {"work": work, "done": sorted(done), "bad": sorted(bad.items())}
    with atomic_write(folder / "state.json") as temporary:
        temporary.write_text(json.dumps(state))


def _read_log(path: Path) -> tuple[set[int], dict[int, str]]:
    """(batches, unreadable rows); a last line that was cut off by a kill does not count."""
    done: set[int] = set()
    bad: dict[int, str] = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        entry = json.loads(line)
        done |= set(entry["batches"])
        bad.update((int(row), reason) for row, reason in entry["bad"])
    return done, bad


def _difference(begun: dict[str, Any], now: dict[str, Any]) -> str:
    names = {"model": "model or preprocessing (by digest)", "images": "list of images (by digest)"}
    names["files"] = "folder of images (by digest)"
    name = next(name for name in {**begun, **now} if begun.get(name) != now.get(name))
    short = (str(value)[:16] for value in (begun.get(name), now.get(name)))
    return "begun with another {}: {}, now {}".format(names.get(name, name), *short)
