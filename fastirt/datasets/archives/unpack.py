"""An archive's folder, unpacked whole or not at all; nothing is written outside it."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Iterator, NamedTuple

from tqdm import tqdm

from fastirt.atomic import sync_folder
from fastirt.datasets.archives.published import Archive
from fastirt.errors import UserError, first_line

log = logging.getLogger("fastirt")

TOO_MUCH = 4  # times the published number of bytes
MAX_MEMBERS = 2_000_000
# What tarfile and zipfile raise on a damaged file.
DAMAGE: tuple[type[Exception], ...] = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)
DAMAGE += (struct.error, NotImplementedError, RuntimeError, UnicodeError, ValueError)


class Member(NamedTuple):
    """A file or folder of an archive."""

    name: str  # as the archive has it
    is_folder: bool
    size: int  # bytes, as the archive states
    file: IO[bytes] | None  # None: a folder


def unpack(archive: Archive, file: Path, target: Path, progress: bool = True) -> None:
    """Unpack the folder `archive.folder` of `file` as `target`.

    Members beside that folder are left out. The files are written to a temporary folder beside
    `target`, which is renamed when all are there.

    Raises UserError for a damaged archive, members outside the archive's folder, links, devices,
    more bytes than the archive states or than four times `archive.unpacked`, and a full disk.
    """
    temporary = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a call that was killed
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    try:
        temporary.mkdir(parents=True)
        with tqdm(
            total=archive.unpacked, desc=f"unpack {file.name}", unit="B", unit_scale=True, mininterval=interval,
            disable=not progress,
        ) as bar:  # fmt: skip
            _write_all(archive, file, temporary, bar)
        os.sync()
        os.replace(temporary, target)
        sync_folder(target.parent)
    except DAMAGE as error:
        raise UserError(f"{file}: cannot be unpacked ({first_line(error)}): download it again") from None
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{target}: {file.name} cannot be unpacked there ({reason}): free space or mend it") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_all(archive: Archive, file: Path, temporary: Path, bar: tqdm) -> None:
    limit, total, beside, written = TOO_MUCH * archive.unpacked, 0, 0, 0
    for number, member in enumerate(members(file)):
        inner = _inside(member, file)
        total += member.size
        if total > limit or number >= MAX_MEMBERS:
            raise UserError(f"{file}: states more than {limit:,} bytes or {MAX_MEMBERS:,} members: refused")
        if inner[:1] != [archive.folder] or inner[-1].startswith("._"):  # macOS's notes on files
            beside += bool(inner)
            continue
        path = temporary.joinpath(*inner[1:])
        if member.is_folder:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "xb") as out:
                _copy(member, out, file, bar)
        except FileExistsError:
            raise UserError(f"{file}: holds '{member.name}' twice: refused") from None
        written += 1
    if not written:
        raise UserError(f"{file}: has no folder {archive.folder}: not the published archive")
    if beside:
        log.info("download: %d members beside %s/ in %s are left out", beside, archive.folder, file.name)


def _copy(member: Member, out: IO[bytes], file: Path, bar: tqdm) -> None:
    left = member.size
    assert member.file is not None
    while data := member.file.read(min(2**20, left + 1)):
        left -= len(data)
        if left < 0:
            raise UserError(f"{file}: '{member.name}' holds more bytes than the archive states: refused")
        out.write(data)
        bar.update(len(data))
    if left:
        raise UserError(f"{file}: '{member.name}' is cut off: download the archive again")


def _inside(member: Member, file: Path) -> list[str]:
    """The parts of a member's path. Raises UserError for one that leaves the archive's folder."""
    name = member.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or "\\" in name or ":" in name.split("/")[0]:
        raise UserError(f"{file}: '{name[:100]!a}' is a path outside the archive's folder: refused")
    return parts or ([] if member.is_folder else [""])


def members(file: Path) -> Iterator[Member]:
    """The files and folders of a .zip or .tgz, in its order.

    Raises UserError for a link or a device, and the errors of `DAMAGE`.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(f"{file}: '{entry.filename}' is a link or a device: refused")
                if entry.is_dir():
                    yield Member(entry.filename, True, 0, None)
                    continue
                with archive.open(entry) as opened:
                    yield Member(entry.filename, False, entry.file_size, opened)
        return
    with tarfile.open(file, "r|gz") as stream:
        for info in stream:
            if not (info.isreg() or info.isdir()):
                raise UserError(f"{file}: '{info.name}' is a link or a device: refused")
            yield Member(info.name, info.isdir(), info.size, None if info.isdir() else stream.extractfile(info))
