"""Changes of a gallery that are killed at each of their steps, and what is found afterwards.

Run in a process of its own, which forks: `python -m tests.gallery.killed FOLDER STORE STRIDE`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Callable

import numpy as np
import safetensors.numpy
import safetensors.torch  # noqa: F401  once, not in each child

from fastirt.gallery import Gallery
from fastirt.gallery.bundle import read_manifest
from fastirt.gallery.stores.files import FileStore  # noqa: F401  with torch
from tests.gallery.made_up import made_up, paths, unit

COUNT = 40
KILLED = object()  # a result that no child returns
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")


def die_at(step: int, folder: Path) -> None:
    """Kill this process at the step-th time that it opens, renames or deletes below `folder`."""
    left = [step]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and str(folder) in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a child: LanceDB's threads do not survive a fork of their process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, pickle.dumps(function(*args)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        result = file.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return KILLED
    assert os.WEXITSTATUS(status) == 0, status
    return pickle.loads(result)


def killed(step: int, folder: Path, change: Callable[[Path], None]) -> bool:
    """Whether a child that makes this change was killed at that step, or ended before it."""

    def make() -> None:
        die_at(step, folder)
        change(folder)

    return forked(make) is KILLED


def add(folder: Path) -> None:
    Gallery.open(folder).add_vectors(unit(50, 1), paths(50, "new"), root="/images")


def replace(folder: Path) -> None:
    Gallery.open(folder).add_vectors(unit(5, 1), paths(5), root="/images")


def remove(folder: Path) -> None:
    Gallery.open(folder).remove(paths(30))


def build(folder: Path) -> None:
    Gallery.from_vectors(unit(70, 2), paths(70, "other"), folder)


def content(folder: Path) -> dict[str, bytes]:
    """SHA-256 of the vector by path, of all rows."""
    return {
        path: hashlib.sha256(vector.tobytes()).digest()
        for rows, vectors in Gallery.open(folder)._store.batches()
        for path, vector in zip(rows.paths, np.ascontiguousarray(vectors))
    }


def prepare(folder: Path, store: str) -> dict[str, bytes]:
    shutil.rmtree(folder, ignore_errors=True)
    made_up(folder, COUNT, store=store)
    return content(folder)


def later(folder: Path) -> dict[str, bytes]:
    """The next change works, whatever was killed before."""
    Gallery.open(folder).add_vectors(unit(1, 9), ["later"])
    found = content(folder)
    assert found.pop("later") == hashlib.sha256(unit(1, 9).tobytes()).digest()
    return found


def main(folder: Path, store: str, stride: int) -> None:
    for change in (add, replace, remove, build):
        outcomes: list[str] = []
        while not outcomes or outcomes[-1] != "ended":
            step = 1 + stride * len(outcomes)
            old = forked(prepare, folder, store)
            alive = not killed(step, folder, change)
            found = forked(content, folder)
            outcomes.append("ended" if alive else "old" if found == old else "new")
            assert forked(later, folder) == found, (change, step)
            if outcomes[-1] == "new":
                new = found
        assert found != old and "old" in outcomes, (change, outcomes)
        assert "new" not in outcomes or new == found, (change, outcomes)
        print(change.__name__, len(outcomes), outcomes.count("new"), flush=True)
    left = {file.name for file in folder.iterdir()} - {*read_manifest(folder)["files"], "gallery.json", "lock"}
    assert left <= {"lance"}, left


def first_build(folder: Path, stride: int) -> None:
    """A killed first build is no gallery, is named as such, and the next build takes its place."""
    from fastirt.errors import UserError

    step = 1
    while killed(step, folder, build):
        try:
            assert len(Gallery.open(folder)) == 70
        except UserError as error:
            assert str(folder) in str(error), error
        build(folder)
        assert len(Gallery.open(folder)) == 70
        shutil.rmtree(folder)
        step += stride
    print("first build", step)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "gallery", sys.argv[2], int(sys.argv[3]))
    first_build(Path(sys.argv[1]) / "first", int(sys.argv[3]))
