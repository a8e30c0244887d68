"""Images to batches on the device: reading, checking, decoding and replacing, in the background."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Sequence

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images.formats.header_check import Undecodable
from fastirt.images.prepare import Encoded
from fastirt.images.source import ImageSource
from fastirt.loading.augment import draw_crops
from fastirt.loading.batch import Batch
from fastirt.loading.image_reader import ImageReader, _Loader
from fastirt.loading.sampler import make_sampler

if TYPE_CHECKING:
    from fastirt.datasets import Split


class TrainLoader(_Loader):
    """Batches for start_step, start_step + 1, … up to stop_step (exclusive; None: endless).

    Batch `step` is a function of (seed, step, which images are bad), whatever the number of threads and wherever the run began.
    m = 0: shuffled epochs, else m images per class. `store`: where images are read from, default their files. `bad`: rows known to be
    unreadable from the start (of a checkpoint). Raises UserError for impossible settings, and while iterating for more than
    `input.max_bad` unreadable files.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        m: int,
        seed: int,
        input: InputConfig,
        device: torch.device,
        start_step: int = 0,
        stop_step: int | None = None,
        store: ImageSource | None = None,
        bad: Iterable[int] = (),
        csv_path: Path | None = None,
        class_names: Sequence[str] | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        first, count = ranks.batch_slice(batch_size)
        self._reader = ImageReader(split, count, input, device, store, csv_path, bad, ranks)
        self._sampler = make_sampler(split.labels, batch_size, m, seed)
        self._slice, self._whole = slice(first, first + count), batch_size
        self._seed, self._start, self._stop, self._class_names = seed, start_step, stop_step, class_names

    def _batches(self) -> Iterator[Batch]:
        step, reading = self._start, {}
        while self._stop is None or step < self._stop:
            yield self._finish(step, reading)
            step += 1

    def _finish(self, step: int, reading: dict[int, "Future[Encoded]"]) -> Batch:
        """Reads and decodes one batch, again and again with replacements until no image of it is bad; begins to read the next."""
        reader, own = self._reader, self._slice
        crops = draw_crops(self._seed, step, self._whole)[own]
        while True:
            whole = self._sampler.batch(step, reader.bad)
            rows = whole[own]
            reading.update(reader.start_reading(row for row in rows.tolist() if row not in reading))
            encoded, lost = reader.finish_reading(reading, rows, step)
            if not lost:
                following = reader.start_reading(self._sampler.batch(step + 1, reader.bad)[own])
                try:
                    images = reader.decode([encoded[row] for row in rows.tolist()], crops.x, crops.y, crops.flip)
                except Undecodable as error:
                    lost = sorted({int(rows[i]) for i in error.reasons})
                    for i, reason in error.reasons.items():
                        reader.mark_bad(int(rows[i]), reason, step)
            lost = sorted(reader.agree().union(lost).intersection(whole.tolist()))
            if not lost:
                reading.clear()
                reading.update(following)
                return reader.batch(images, reader.labels[rows], rows, step, len(rows), whole)
            self._name_lost_classes(lost)

    def _name_lost_classes(self, lost: Sequence[int]) -> None:
        if not self._reader.ranks.is_main:  # all lose the same ones
            return
        labels, bad = self._reader.labels, self._reader.bad
        for label in sorted({int(labels[row]) for row in lost}):
            if bad.issuperset(np.flatnonzero(labels == label).tolist()):
                name = (
                    self._class_names[label]
                    if self._class_names
                    else os.path.dirname(self._reader.source.path(lost[0]))
                )
                logging.getLogger("fastirt").warning(
                    "class %d (%s) has no readable image left: it leaves the sampler", label, name
                )
