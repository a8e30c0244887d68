"""A folder that appears complete or not at all, in place of an earlier export."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import Iterator

from fastirt.atomic import sync_folder
from fastirt.errors import UserError

REPORT = "export.json"  # a folder with this file is an export, which --overwrite may replace


def check_place(out: Path, overwrite: bool) -> None:
    """Raises UserError if `out` cannot become an export."""
    if os.path.ismount(out):  # cannot be replaced by a rename, which would fail after all the work
        raise UserError(f"{out}: a mount point, which cannot be replaced: choose a folder below it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{out}: exists: choose another folder, or pass --overwrite")
    if not (out / REPORT).is_file():
        raise UserError(f"{out}: not an export, so --overwrite leaves it alone: choose another folder")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out`; an error in the block removes it.

    Raises UserError if `out` cannot be made, if the disk is full, or if another process has made
    `out` in the meantime.
    """
    temporary, replaced = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    with contextlib.ExitStack() as held:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(out)
            temporary.mkdir()
            held.callback(shutil.rmtree, temporary, ignore_errors=True)
            held.enter_context(_locked(temporary))
        except OSError as error:
            raise UserError(f"{out}: cannot be made ({error.strerror})") from error
        try:
            yield temporary
            check_place(out, overwrite)
            _replace(out, temporary, replaced)
        except OSError as error:
            if error.errno is None:
                raise
            raise UserError(f"{error.filename or out}: {error.strerror}: nothing was exported") from error


def _replace(out: Path, temporary: Path, replaced: Path) -> None:
    earlier = out.exists()
    if earlier:
        os.replace(out, replaced)
    try:
        os.replace(temporary, out)
    except OSError:
        if earlier:
            os.replace(replaced, out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed processes left; an export that one had put aside goes back."""
    name = re.compile(rf"\.{re.escape(out.name)}\.\d+\.(tmp|old)")
    for entry in [entry for entry in out.parent.iterdir() if name.fullmatch(entry.name)]:
        with contextlib.suppress(OSError), _locked(entry):  # another process is at work in it
            if entry.suffix == ".old" and not out.exists():
                os.replace(entry, out)
            else:
                shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the end of the process gives back. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
