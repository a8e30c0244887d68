"""Batches to evaluate on: each image of a split once, in order."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError
from fastirt.images.formats.header_check import Undecodable
from fastirt.images.prepare import Encoded
from fastirt.images.source import ImageSource
from fastirt.loading.batch import Batch
from fastirt.loading.image_reader import ImageReader, _Loader

if TYPE_CHECKING:
    from fastirt.datasets import Split


class EvalLoader(_Loader):
    """All images of a split in catalogue order, centre crop, in as few batches of at most `batch_size` as there can be.

    All batches have one size, the smallest that will do, so that padding is less than one image a batch. Unreadable
    images are left out and named once; a batch of which nothing is left is skipped. `Batch.step` counts batches.
    Can be iterated again. Many ranks share the batches out, each a stretch of them; `agree` then tells all what could not be read.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        input: InputConfig,
        device: torch.device,
        store: ImageSource | None = None,
        csv_path: Path | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--eval-batch-size {batch_size}: must be at least 1")
        batches = max(1, -(-len(split) // batch_size))
        size = max(1, -(-len(split) // batches))
        self._reader = ImageReader(split, size, input, device, store, csv_path, (), ranks)

    def __len__(self) -> int:
        """Number of batches of all ranks, if none is lost."""
        return -(-len(self._reader.split) // self._reader.batch_size)

    @property
    def own(self) -> range:
        """This rank's batches."""
        ranks = self._reader.ranks
        return range(len(self) * ranks.rank // ranks.world_size, len(self) * (ranks.rank + 1) // ranks.world_size)

    def agree(self) -> None:
        """Name what any rank could not read. Called by all ranks, after the last batch."""
        self._reader.agree("control")

    def _batches(self) -> Iterator[Batch]:
        reader, size = self._reader, self._reader.batch_size

        def start(step: int) -> dict[int, "Future[Encoded]"]:
            rows = range(step * size, min((step + 1) * size, len(reader.split)))
            return reader.start_reading(row for row in rows if row not in reader.bad)

        following = start(self.own.start) if self.own else {}
        for step in self.own:
            reading, following = following, start(step + 1) if step + 1 in self.own else {}
            encoded, _ = reader.finish_reading(reading, reading, step)
            while encoded:
                try:
                    images = reader.decode(list(encoded.values()))
                except Undecodable as error:
                    rows = list(encoded)
                    for i, reason in error.reasons.items():
                        encoded.pop(rows[i])
                        reader.mark_bad(rows[i], reason, step)
                else:
                    yield self._padded(images, np.fromiter(encoded, np.int64), step)
                    break

    def _padded(self, images: torch.Tensor, rows: np.ndarray, step: int) -> Batch:
        missing = self._reader.batch_size - len(rows)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        pad = np.full(missing, -1, np.int64)
        labels = np.concatenate([self._reader.labels[rows], pad])
        return self._reader.batch(images, labels, np.concatenate([rows, pad]), step, len(rows))
