"""Training batches from the decoded cache: what a batch needs and is not there yet is decoded into it first."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence

import numpy as np
import torch

from fastirt.config.options import Config
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images.formats.header_check import Undecodable
from fastirt.images.prepare import Encoded
from fastirt.images.resize_crop import crop_corners
from fastirt.images.source import FileSource, ImageSource
from fastirt.loading.augment import draw_crops
from fastirt.loading.batch import Batch
from fastirt.loading.cache_budget import make_cache
from fastirt.loading.image_cache import ImageCache, ImageViews, next_missing
from fastirt.loading.train_loader import TrainLoader

if TYPE_CHECKING:
    from fastirt.datasets import Catalog

log = logging.getLogger("fastirt")

LOG_INTERVAL_S = 15.0  # seconds


class CachedTrainLoader(TrainLoader):
    """`TrainLoader` whose batches are views of cached images: the same images, crops, flips and pixels.

    Besides its own images every batch decodes one global batch's worth of further images, in catalogue order, so each rank's
    private cache is full by the end of the first epoch. `fill` does all of that at once. Unreadable images on the way are bad.
    """

    def __init__(self, *given: Any, cache: ImageCache, **named: Any) -> None:
        super().__init__(*given, **named)
        self._cache = cache
        self._next = 0  # every image before this one is there, or bad
        self._said = time.monotonic()

    def fill(self) -> Iterator[int]:
        """Decode every image, in catalogue order; yields the number of rows passed after each batch of them."""
        self.close()
        self._reader.open()
        try:
            reading: dict[int, Future[Encoded]] = {}
            while self._next < len(self._cache.valid):
                with self._reader.on_stream():
                    self._bring(self._ahead(()), self._start, reading)
                    self._reader.agree()
                    reading = self._reader.start_reading(self._ahead(()))
                yield self._next
        finally:
            self.close()

    def _finish(self, step: int, reading: dict[int, "Future[Encoded]"]) -> Batch:
        reader, cache = self._reader, self._cache
        while True:
            whole = self._sampler.batch(step, reader.bad)
            rows = whole[self._slice]
            missing = self._missing(rows)
            lost = self._bring(missing + self._ahead(missing), step, reading)
            reading.clear()
            lost = (lost | reader.agree()).intersection(whole.tolist())
            if not lost:
                break
            self._name_lost_classes(sorted(lost))
        following = self._missing(self._sampler.batch(step + 1, reader.bad)[self._slice])
        reading.update(reader.start_reading(following + self._ahead(following)))
        crops = draw_crops(self._seed, step, self._whole)[self._slice]
        size = reader.input.input_size
        corners = crop_corners(cache.shapes[rows], size, crops.x, crops.y)
        picks = torch.from_numpy(np.column_stack([rows, corners, crops.flip]).astype(np.int64))
        return reader.batch(ImageViews(cache, picks, size), reader.labels[rows], rows, step, len(rows), whole)

    def _missing(self, rows: np.ndarray) -> list[int]:
        return [row for row in dict.fromkeys(rows.tolist()) if not self._cache.valid[row]]

    def _ahead(self, missing: Sequence[int]) -> list[int]:
        """The next images in catalogue order, as many as a batch of all ranks has rows."""
        return next_missing(self._cache, self._next, self._whole, self._reader.bad, missing)

    def _bring(self, rows: list[int], step: int, reading: dict[int, "Future[Encoded]"]) -> set[int]:
        """Read, decode and keep these rows; returns those that turned out to be bad."""
        reader, cache = self._reader, self._cache
        if not rows and self._next == len(cache.valid):
            return set()
        reading = {**reading, **reader.start_reading(row for row in rows if row not in reading)}
        encoded, bad = reader.finish_reading(reading, rows, step)
        lost = set(bad)
        for row, shape in reader.resized(encoded).items():
            if shape != tuple(cache.shapes[row]):
                reader.mark_bad(row, "has another size than when the run began", step)
                lost.add(row)
        todo = [row for row in encoded if row not in lost]
        while todo:
            count = reader.first_part([encoded[row] for row in todo])
            chunk, todo = todo[:count], todo[count:]
            try:
                decoded = reader.decode_whole([encoded[row] for row in chunk])
            except Undecodable as error:
                for i, reason in error.reasons.items():
                    reader.mark_bad(chunk[i], reason, step)
                    lost.add(chunk[i])
                todo = [row for row in chunk if row not in lost] + todo
                continue
            for row, image in zip(chunk, decoded):
                cache.put(row, image)
            reader.wait()
            cache.valid[chunk] = True
        self._advance()
        return lost

    def _advance(self) -> None:
        """Move `_next` past what is there or bad, and say how far it has come."""
        valid, bad, before = self._cache.valid, self._reader.bad, self._next
        while self._next < len(valid) and (valid[self._next] or self._next in bad):
            self._next += 1
        now, total = time.monotonic(), len(valid)
        if before < self._next == total:
            log.info("cache: full, %d images%s", valid.sum(), f", {total - valid.sum()} bad" if not valid.all() else "")
        elif now - self._said > LOG_INTERVAL_S:
            log.info("cache: %d of %d images", valid.sum(), total)
            self._said = now


def train_loader(
    catalog: Catalog,
    config: Config,
    device: torch.device,
    *,
    start_step: int = 0,
    bad: Sequence[int] = (),
    store: ImageSource | None = None,
    csv_path: Path | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainLoader:
    """The batches of a run, cached as `--cache` asks for. store: a packed store's training split, else the files are read."""
    split = catalog.train
    given = dict(
        batch_size=config.optim.batch_size,
        m=config.data.m,
        seed=config.run.seed,
        input=config.input,
        device=device,
        start_step=start_step,
        stop_step=config.optim.max_iter,
        store=store,
        bad=bad,
        csv_path=csv_path,
        class_names=catalog.class_names,
        ranks=ranks,
    )
    source = FileSource(split.paths) if store is None else store
    cache = make_cache(config.input.cache, source, config.input, device, frozenset(bad), ranks)
    return TrainLoader(split, **given) if cache is None else CachedTrainLoader(split, **given, cache=cache)
