"""`fastirt download`: fetch a published archive, check it, and unpack it where `--dataset` reads
it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import urllib.parse
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

from tqdm import tqdm

from fastirt.atomic import sync_folder, try_lock
from fastirt.datasets.archives.published import Archive, Published
from fastirt.datasets.archives.transfer import BrokenOff, Patience, Refused, transfer
from fastirt.datasets.archives.unpack import unpack
from fastirt.datasets.digest import file_digest
from fastirt.datasets.records import Catalog
from fastirt.errors import UserError

log = logging.getLogger("fastirt")

PATIENCE = Patience()


def download(
    published: Published,
    load: Callable[[str], Catalog],
    folder: Path,
    *,
    urls: Sequence[str] = (),
    archive_file: Optional[Path] = None,
    patience: Patience = PATIENCE,
    progress: bool = True,
) -> Path:
    """Fetch and unpack a data set below `folder`; a call that was stopped goes on where it was.

    Args:
        published: facts of the data set, which has an archive.
        load: reads the unpacked folder, as `--dataset` does.
        folder: made if there is none; it gets the archive and, beside it, the data set's folder.
        urls: addresses to try instead of the published ones.
        archive_file: an archive that is on disk already; it is checked like a downloaded one.
        patience: with the server.
        progress: show a progress bar.

    Returns:
        The data set's folder, which `--data-path` takes.

    Raises:
        UserError: no room on disk, no address has the file, wrong bytes, an archive that cannot
            be unpacked, or a folder in the way.
    """
    archive = published.archive
    assert archive is not None
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    target = folder / archive.folder
    with _locked(folder):
        if target.exists():
            _require_complete(published, load, target)
            log.info("download: %s is there already, complete", target)
            return target
        file = folder / archive.name if archive_file is None else archive_file
        if archive_file is not None and not file.is_file():
            raise UserError(f"--archive {file}: no such file")
        _require_space(archive, folder, file)
        if not file.exists():
            _fetch(archive, file, urls or archive.urls, patience, progress)
        elif archive_file is None:
            log.info("download: %s is there already: checking it", file)
            check_bytes(archive, file, progress, delete=True)
        else:
            check_bytes(archive, file, progress)
        unpack(archive, file, target, progress)
        _require_complete(published, load, target)
    log.info("download: %s is complete; %s may be deleted", target, file)
    return target


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make and hold the folder. Raises UserError while another download does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".fastirt-download.lock", "w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): choose another folder") from None
    with file:
        if not try_lock(file):
            raise UserError(f"{folder}: another download is working there: wait for it, or choose another folder")
        yield


def is_complete(published: Published, load: Callable[[str], Catalog], folder: Path) -> bool:
    """Whether the data set in `folder` has the published number of images."""
    return not _lack(published, load, folder)


def _require_complete(published: Published, load: Callable[[str], Catalog], target: Path) -> None:
    if lack := _lack(published, load, target):
        raise UserError(f"{target}: incomplete ({lack}): delete or move it, and download again")


def _lack(published: Published, load: Callable[[str], Catalog], folder: Path) -> str:
    """What is missing in `folder`; "" for nothing."""
    try:
        splits = load(str(folder)).splits()
    except UserError as error:
        return str(error)
    lacks = [f"{len(s):,} {s.name} images instead of {published.images[s.name]:,}" for s in splits]
    return ", ".join(lack for lack, s in zip(lacks, splits) if len(s) != published.images[s.name])


def _require_space(archive: Archive, folder: Path, file: Path) -> None:
    """Raises UserError if archive and data set do not fit on the folder's disk."""
    part = _part(file)
    have = file.stat().st_size if file.exists() else part.stat().st_size if part.exists() else 0
    needed = max(0, archive.size - have) + archive.unpacked
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed ({archive.name} and its "
            "unpacked files): free space or choose another folder"
        )


def _fetch(archive: Archive, file: Path, urls: Sequence[str], patience: Patience, progress: bool) -> None:
    part, problems = _part(file), []
    for url in urls:
        _check_address(url)
    have = part.stat().st_size if part.exists() else 0
    if have:
        log.info("download: going on after %s bytes of %s", f"{have:,}", part)
    for url in urls:
        have = part.stat().st_size if part.exists() else 0
        try:
            with _bar(archive.size, f"download {archive.name}", progress, have) as bar:
                transfer(url, part, archive.size, patience, bar.update)
        except (Refused, BrokenOff) as error:
            problems.append(f"{url}: {error}")
            continue
        if not (problem := _difference(archive, part, progress)):
            break
        part.unlink()  # the next address may have the right ones
        problems.append(f"{url}: other bytes ({problem})")
    else:
        have = part.stat().st_size if part.exists() else 0
        kept = f"; the next call goes on after the {have:,} bytes in {part}" if have else ""
        raise UserError(
            f"{archive.name}: not downloaded: {'; '.join(problems)}: try again later, pass --url a mirror (its "
            f"bytes are checked), or --archive a file that you have{kept}"
        )
    os.replace(part, file)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)
    sync_folder(file.parent)


def _check_address(url: str) -> None:
    """Raises UserError for an address that no server can have."""
    try:
        address = urllib.parse.urlsplit(url)
        is_usable = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
    except ValueError:  # a port or an IPv6 address that is none
        is_usable = False
    if not is_usable or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise UserError(f"--url {url[:200]!a}: is no http or https address: pass one, or --archive FILE")


def _part(file: Path) -> Path:
    return file.with_name(file.name + ".part")


def check_bytes(archive: Archive, file: Path, progress: bool = True, delete: bool = False) -> None:
    """Raises UserError where `file` is not the published archive. delete: remove it then."""
    if not (problem := _difference(archive, file, progress)):
        return
    if delete:
        file.unlink()
    fate = "deleted: download again, from another --url if this repeats" if delete else "it was not used"
    raise UserError(f"{file}: not the published {archive.name}: {problem}: {fate}")


def _difference(archive: Archive, file: Path, progress: bool) -> str:
    """How `file` differs from the published archive; "" where it does not."""
    size = file.stat().st_size
    if size != archive.size:
        return f"{size:,} bytes instead of {archive.size:,}"
    found = sha256(file, progress)
    return f"sha256 {found} instead of {archive.sha256}" if found != archive.sha256 else ""


def sha256(file: Path, progress: bool = False) -> str:
    """Hex digest of a file's bytes."""
    with _bar(file.stat().st_size, f"check {file.name}", progress) as bar:
        return file_digest(file, bar.update)


def _bar(total: int, name: str, progress: bool, initial: int = 0) -> tqdm:
    """A bar of bytes with the rate in MB/s."""
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    options = dict(unit="B", unit_scale=True, unit_divisor=1000, mininterval=interval)
    return tqdm(total=total, initial=initial, desc=name, disable=not progress, **options)
