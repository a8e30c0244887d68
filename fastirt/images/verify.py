"""`fastirt verify`: whether a data set on disk is the published one, and every file decodes."""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Optional

import numpy as np
import torch
from tqdm import tqdm

from fastirt.config.options import InputConfig
from fastirt.datasets.archives.download import sha256
from fastirt.datasets.archives.published import Published
from fastirt.datasets.copies import warn_of_copies
from fastirt.datasets.digest import catalog_digest
from fastirt.datasets.records import Catalog, Split, counted
from fastirt.errors import UserError
from fastirt.images.decoders.choose import choose_loader, make_decoder
from fastirt.images.decoders.interface import Decoder, parts
from fastirt.images.formats.header_check import BadImage, Undecodable
from fastirt.images.packed_store import PackedSplit, PackedStore
from fastirt.images.prepare import Encoded, prepare
from fastirt.images.resize_crop import resized_sizes
from fastirt.images.source import FileSource, ImageSource

BATCH = 64  # images that are read and decoded together
SIDE = 32  # pixels that a decoded image is resized to: small, so that decoding is the work


class Row(NamedTuple):
    """A line of the table."""

    check: str
    found: str
    expected: str  # "": nothing is published about it
    is_right: bool


@dataclass
class Report:
    """What was checked, and a line for each thing that is wrong."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, check: str, found: object, expected: object = "", problem: str = "") -> None:
        """One check; without `problem`, it is wrong where `expected` is another value."""
        found, expected = _text(found), _text(expected)
        if not problem and expected and found != expected:
            problem = f"{check}: {found} instead of {expected}"
        if problem:
            self.problems.append(problem)
        self.rows.append(Row(check, found, expected, not problem))

    def table(self) -> str:
        rows = [
            ("check", "found", "expected", ""),
            *((*row[:3], "ok" if row.is_right else "WRONG") for row in self.rows),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip() for row in rows
        )


def verify(
    catalog: Catalog,
    published: Optional[Published],
    *,
    packed: Optional[Path] = None,
    orientation: str = "stored",
    threads: int = 1,
    progress: bool = True,
) -> Report:
    """Check counts, spot digests and archives of a published set, and decode every file of any.

    Args:
        catalog: the data set as it was read.
        published: its facts; None for a user's own set.
        packed: a packed store of the set, each row of which is read and decoded too.
        orientation: as a run reads the images, "exif" or "stored".
        threads: that read and decode.
        progress: show progress bars.
    """
    report = Report()
    if published is not None:
        check_archives(published, Path(catalog.root), report, progress)
    _check_counts(catalog, published, report)
    for name, md5 in published.spot_md5 if published is not None else ():
        report.add(f"md5 of {name}", _md5(Path(catalog.root) / name), md5)
    report.add("sha256 of the list", catalog_digest(catalog))
    copies = warn_of_copies(catalog)  # published sets have some, which are part of the benchmark
    found = f"{counted(copies, 'copy', 'copies')} between splits or classes: the warning above names two"
    report.add("harmful copies", copies, problem=found if copies and published is None else "")
    sources = [(split, FileSource(split.paths)) for split in catalog.splits()]
    _decode("files", sources, orientation, threads, report, progress)
    if packed is not None:
        _check_packed(packed, catalog, threads, report, progress)
    return report


def check_archives(published: Published, root: Path, report: Report, progress: bool = True) -> None:
    """The digest of the set's archive, where it lies in the set's folder or beside it."""
    archive = published.archive
    for folder in (root, root.parent) if archive is not None else ():
        file = folder / archive.name
        if file.is_file():
            size = file.stat().st_size
            report.add(f"bytes of {archive.name}", size, archive.size)
            if size == archive.size:
                report.add(f"sha256 of {archive.name}", sha256(file, progress), archive.sha256)


def _check_counts(catalog: Catalog, published: Optional[Published], report: Report) -> None:
    for split in catalog.splits():
        images, classes = ("", "")
        if published is not None:
            images, classes = published.images[split.name], published.classes[split.name]
        report.add(f"{split.name} images", len(split), images)
        report.add(f"{split.name} classes", len(np.unique(split.labels)), classes)


def _check_packed(packed: Path, catalog: Catalog, threads: int, report: Report, progress: bool) -> None:
    try:
        store = PackedStore.open(packed)
        header = store.header
        store.check(catalog, header["resize"], header["resize_size"], store.orientation)
        sources = [(split, store.split(split)) for split in catalog.splits()]
    except UserError as error:
        report.add("packed store", "damaged, foreign or stale", problem=str(error))
        return
    _decode("packed images", sources, store.orientation, threads, report, progress)


def _decode(
    what: str,
    sources: Iterable[tuple[Split, ImageSource]],
    orientation: str,
    threads: int,
    report: Report,
    progress: bool,
) -> None:
    """Read, check and decode every image; also the sha256 over the sha256 of each one's bytes."""
    device = torch.device("cpu")
    input = InputConfig(input_size=SIDE, resize="square", resize_size=SIDE, orientation=orientation)
    decoder = make_decoder(choose_loader("auto", device), input, BATCH, threads, device)
    digest, decoded, total, problems = hashlib.sha256(), 0, 0, []
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="fastirt-verify") as pool:
            for split, source in sources:
                total += len(source)
                name = f"decode {what} of {split.name}"
                with tqdm(total=len(source), desc=name, unit="img", mininterval=interval, disable=not progress) as bar:
                    for encoded, digests, failed in _read(source, input, pool):
                        failed |= _undecodable(encoded, decoder, input)
                        decoded += len(digests) - len(failed)
                        problems += [f"{source.path(row)}: {reason}" for row, reason in sorted(failed.items())]
                        for one in digests:
                            digest.update(one)
                        bar.update(len(digests))
    finally:
        decoder.close()
    report.add(f"{what} decoded", decoded, total, problem=f"{total - decoded} {what} of {total}" if problems else "")
    if problems:
        report.problems[-1:] = problems
    report.add(f"sha256 of the {what}", digest.hexdigest())


def _read(
    source: ImageSource, input: InputConfig, pool: ThreadPoolExecutor
) -> Iterator[tuple[dict[int, Encoded], list[bytes], dict[int, str]]]:
    """Batches of (images by row, digest of each image's bytes, reason by bad row), read ahead."""

    def one(row: int) -> tuple[Optional[Encoded], bytes, str]:
        digest = b""
        try:
            data = source.read(row)
            digest = hashlib.sha256(data).digest()
            is_prepared = isinstance(source, PackedSplit)
            return (data, source.size(row)) if is_prepared else prepare(data, source.path(row), input), digest, ""
        except BadImage as bad:
            return None, digest, bad.reason

    starts = range(0, len(source), BATCH)
    batches = [range(start, min(start + BATCH, len(source))) for start in starts]
    ahead = [pool.submit(one, row) for row in batches[0]] if batches else []
    for number, rows in enumerate(batches):
        results = [task.result() for task in ahead]
        following = batches[number + 1] if number + 1 < len(batches) else ()
        ahead = [pool.submit(one, row) for row in following]
        yield (
            {row: encoded for row, (encoded, _, _) in zip(rows, results) if encoded is not None},
            [digest for _, digest, _ in results],
            {row: reason for row, (_, _, reason) in zip(rows, results) if reason},
        )


def _undecodable(encoded: dict[int, Encoded], decoder: Decoder, input: InputConfig) -> dict[int, str]:
    """The reason by row of the images that the decoder refuses."""
    rows, failed = list(encoded), {}
    sizes = np.array([encoded[row][1] for row in rows], np.int64).reshape(-1, 2)
    resized = resized_sizes(sizes.tolist(), input)
    for part in parts(sizes, resized) if rows else ():
        try:
            decoder.decode_whole([encoded[row][0] for row in rows[part]], sizes[part], resized[part])
        except Undecodable as error:
            failed |= {rows[part][i]: reason for i, reason in error.reasons.items()}
    return failed


def _md5(file: Path) -> str:
    try:
        return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError as error:
        return (error.strerror or "unreadable").lower()


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
