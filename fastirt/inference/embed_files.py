"""`fastirt embed`: a list of images to a file of vectors; goes on after a kill, shared by ranks."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
from tqdm import tqdm

from fastirt import __version__
from fastirt.config.validate import check_number
from fastirt.datasets.records import printable
from fastirt.distributed.launch import only_main_warns
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import OS_ERRNOS, UserError
from fastirt.images.packed_store import PackedSplit
from fastirt.inference.image_list import ImageList
from fastirt.inference.list_loader import MeasuredSource
from fastirt.inference.model import PREPROCESSING, Model
from fastirt.inference.partial_vectors import PartialVectors
from fastirt.inference.vector_files import Rows, check_out, files_of, part_folder, write_vectors

log = logging.getLogger("fastirt")

LOG_SECONDS = 30.0


def embed_files(
    model: Model,
    list_images: Callable[[], ImageList],
    out: Path,
    *,
    dtype: str = "fp32",
    batch_size: int = 128,
    overwrite: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> None:
    """Embed all images into `out`, as `vector_files` describes it.

    The bytes do not depend on the number of ranks, nor on kills and resumptions.

    Args:
        model: on this rank's device.
        list_images: makes the list, the same on every rank.
        out: .npy, .safetensors or .parquet.
        dtype: "fp32" or "fp16".
        batch_size: the most images in a batch.
        overwrite: replace a finished `out`, and unfinished work of another model or list.
        ranks: share the batches.

    Raises:
        UserError: no images, `out` exists or cannot be written, or its unfinished vectors are of
            another model or list.
    """
    check_number("batch_size", batch_size)
    ranks.host.run_on_main(lambda: check_out(out, overwrite))
    images = _same_on_all(list_images, ranks)
    if os.path.abspath(images.place) in map(os.path.abspath, files_of(out)):
        raise ranks.shared_error(f"{out}: would replace the list of images {images.place}: choose another OUT")
    work = _work(model, images, dtype, batch_size)
    if len({str(of) for of in ranks.host.gather_json(work)}) > 1:
        raise ranks.shared_error("the ranks read other images or weights: check that all have the same files")
    folder = part_folder(out)
    with contextlib.ExitStack() as held:
        held.enter_context(_one_line_for_a_full_disk(out))

        def begin() -> None:
            check_out(out, overwrite)  # another process may have finished it since
            held.enter_context(PartialVectors.begin(folder, work, model.dim, overwrite))

        ranks.host.run_on_main(begin)
        part = held.enter_context(contextlib.closing(PartialVectors(folder, ranks.rank)))
        began = time.monotonic()
        embedded = _embed_missing(model, images, part, batch_size, ranks)
        part.commit()
        counts = ranks.host.gather_json(embedded)

        def finish() -> None:
            part.merge()
            if isinstance(images.source, PackedSplit):
                part.sizes[:] = np.stack([images.source.store.index[side] for side in ("width", "height")], axis=1)
            rows = Rows(images, part.sizes, part.bad)
            description = {**_description(model, images, work), "bad": len(part.bad)}
            write_vectors(out, part.vectors_file, rows, description)
            part.remove()
            seconds = time.monotonic() - began
            _report(out, work, model.dim, len(part.bad), sum(counts), seconds)

        ranks.host.run_on_main(finish)


def _embed_missing(model: Model, images: ImageList, part: PartialVectors, batch_size: int, ranks: Ranks) -> int:
    """Embed this rank's share of the batches that are not done; returns their number of images."""

    def on_bad(row: int, name: str, reason: str) -> None:
        log.warning("bad image: %s: %s", printable(name), reason)
        part.add_bad(row, reason)

    if not isinstance(images.source, PackedSplit):  # its index has the sizes
        images = images.with_source(MeasuredSource(images.source, part.sizes))
    loader = model.loader(images, batch_size, on_bad, ranks)
    missing = [batch for batch in range(len(loader)) if batch not in part.done]
    own = missing[len(missing) * ranks.rank // ranks.world_size : len(missing) * (ranks.rank + 1) // ranks.world_size]
    loader.todo = own
    total = sum(len(loader.rows(batch)) for batch in own)
    if ranks.is_main and part.done:
        log.info("embed: %s goes on with %d of %d batches", part.folder, len(missing), len(loader))

    def write(batch: int, found: Optional[np.ndarray], at: Optional[np.ndarray]) -> None:
        rows = loader.rows(batch)
        vectors = np.full((len(rows), model.dim), np.nan, np.float32)
        if found is not None:
            vectors[at - rows.start] = found
        part.write(batch, rows.start, vectors)
        shown.update(len(rows) * ranks.world_size)

    with _Progress(total * ranks.world_size, ranks.is_main) as shown:
        waiting = iter(own)
        for found, at in model.embedded(loader):
            model.check_finite(found, at, images)
            batch = loader.batch_of(int(at[0]))
            for unreadable in waiting:  # batches without a readable image, which the loader skips
                if unreadable == batch:
                    break
                write(unreadable, None, None)
            write(batch, found, at)
        for unreadable in waiting:
            write(unreadable, None, None)
    return total


class _Progress:
    """A bar on a terminal, else a line in the log every half a minute."""

    def __init__(self, total: int, shows: bool) -> None:
        self._bar = tqdm(total=total, desc="embed", unit="img", disable=None if shows else True, leave=False)
        self._logs, self._total, self._count = shows and self._bar.disable, total, 0
        self._began = self._logged = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        self._bar.update(count)
        self._count += count
        now = time.monotonic()
        if self._logs and now - self._logged >= LOG_SECONDS:
            rate = self._count / (now - self._began)
            log.info("embed: %s of %s images, %.1f imgs/s", f"{self._count:,}", f"{self._total:,}", rate)
            self._logged = now


def images_of(pictures: str, ranks: Ranks) -> Callable[[], ImageList]:
    """What lists the images: a place on disk, or for "-" the main rank's stdin."""
    if pictures != "-":
        return lambda: ImageList.at(pictures)
    text = ranks.host.run_on_main(lambda: os.fsdecode(sys.stdin.buffer.read()))
    return lambda: ImageList.from_text(text)


def _same_on_all(list_images: Callable[[], ImageList], ranks: Ranks) -> ImageList:
    """The list; an error in it is reported once, by the main rank."""
    listed: list[ImageList] = []

    def on_main() -> None:
        listed.append(list_images())

    ranks.host.run_on_main(on_main)
    with only_main_warns(ranks):
        return listed[0] if listed else list_images()


@contextlib.contextmanager
def _one_line_for_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in OS_ERRNOS:
            raise
        place = error.filename or out
        raise UserError(f"{place}: {error.strerror}: mend that; the same command goes on from here") from error


def _work(model: Model, images: ImageList, dtype: str, batch_size: int) -> dict[str, Any]:
    """What decides the bytes of the vectors."""
    return {
        "model": model.digest,
        "images": images.digest,
        "files": images.files_digest,
        "count": len(images),
        "dtype": dtype,
        "batch size": batch_size,
        "decoder": model.config.input.loader,
        "precision": model.config.model.precision,
        "engine": model.engine,
        "device": model.device.type,
    }


def _description(model: Model, images: ImageList, work: dict[str, Any]) -> dict[str, Any]:
    config, transform = model.config, model.transform
    return {
        "fastirt": __version__,
        "model_digest": work["model"],
        "images_digest": work["images"],
        "count": work["count"],
        "dim": model.dim,
        "dtype": work["dtype"],
        "model": config.model.model,
        "pooling": config.model.pooling,
        "eval_descriptor": config.model.eval_descriptor,
        **{name: getattr(config.input, name) for name in PREPROCESSING},
        "mean": list(transform.mean),
        "std": list(transform.std),
        "decoder": work["decoder"],
        "precision": work["precision"],
        "engine": work["engine"],
    }


def _report(out: Path, work: dict[str, Any], dim: int, bad: int, embedded: int, seconds: float) -> None:
    if bad:
        log.warning("embed: %s of %s images are unreadable: their rows are NaN", f"{bad:,}", f"{work['count']:,}")
    rate = embedded / max(seconds, 1e-9)
    print(
        f"{printable(str(out))}: {work['count']:,} x {dim} {work['dtype']}, {bad:,} unreadable; "
        f"embedded {embedded:,} images in {seconds:.1f} s, {rate:.1f} imgs/s"
    )
