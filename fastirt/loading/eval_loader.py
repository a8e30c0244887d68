"""Batches to evaluate on: each image of a split once, in order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Iterator

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.config.validate import check_number
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images.bad_images import BadRows
from fastirt.images.source import FileSource, ImageSource
from fastirt.loading.batch import Batch, ImageViews
from fastirt.loading.cached_images import CachedCrops
from fastirt.loading.image_cache import ImageCache
from fastirt.loading.image_reader import DecodedImages, ImageDecoder, ImageReader
from fastirt.loading.prefetch import BackgroundLoader, DeviceStream

if TYPE_CHECKING:
    from fastirt.datasets import Split


class EvalLoader(BackgroundLoader):
    """Center crops of all images of a split, in catalogue order, in as few batches as possible.

    All batches have one size, the smallest that does not add a batch, so padding is less than one
    image a batch. Unreadable images are left out and reported once; a batch without any readable
    image is skipped. `Batch.step` counts batches. The loader can be iterated again. Each rank makes
    a consecutive part of the batches.

    Args:
        split: the N images, with labels (N,) int64.
        batch_size: the most images in a batch.
        input: resize, crop, decoder and threads.
        device: where batches go.
        store: images are read from here; None: from the files of the split.
        csv_path: a `bad_pictures.csv` that lists unreadable images; None: they are only logged.
        ranks: share the batches; all must call `agree` after the last one.

    Raises:
        UserError: settings are impossible; while iterating, more than `--max-bad` images are
            unreadable.
    """

    images: DecodedImages | CachedCrops

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
        check_number("eval_batch_size", batch_size)
        batches = max(1, -(-len(split) // batch_size))
        self._size = max(1, -(-len(split) // batches))
        self._labels, self._ranks = np.asarray(split.labels, np.int64), ranks
        source = FileSource(split.paths) if store is None else store
        threads = ranks.threads(input.num_workers)
        super().__init__(
            DecodedImages(
                ImageReader(source, input, threads),
                ImageDecoder(input, self._size, threads, device),
                BadRows(source, csv_path, input.max_bad, ranks=ranks),
                DeviceStream(device, input.pin_mem),
            )
        )

    def __len__(self) -> int:
        """Number of batches of all ranks, if none is lost."""
        return -(-len(self._labels) // self._size)

    @property
    def own(self) -> range:
        """This rank's batches."""
        rank, count = self._ranks.rank, self._ranks.world_size
        return range(len(self) * rank // count, len(self) * (rank + 1) // count)

    @property
    def own_rows(self) -> range:
        """Rows of this rank's batches."""
        first, stop = (min(batch * self._size, len(self._labels)) for batch in (self.own.start, self.own.stop))
        return range(first, stop)

    def keep_in(self, cache: ImageCache) -> None:
        """Keep the crops of `own_rows` in `cache`, which has room for them, and reuse them."""
        assert isinstance(self.images, DecodedImages)
        self.images = CachedCrops(self.images, cache, self.own_rows.start)

    def agree(self) -> None:
        """Report what any rank could not read. A collective call, after the last batch."""
        self.images.bad.sync(self._ranks.host)

    def batches(self) -> Iterator[Batch]:
        for step in self.own:
            views = None
            while views is None and len(rows := self._rows(step)):
                views = self.images.views(rows, None, step, self._rows(step + 1))
            if views is not None:
                yield self._padded(views.images, rows, step)

    def _rows(self, step: int) -> np.ndarray:
        """Rows of a batch that are not known to be bad; none where the batch is not this rank's."""
        first = step * self._size
        rows = range(first, min(first + self._size, len(self._labels))) if step in self.own else ()
        return np.array([row for row in rows if row not in self.images.bad.rows], np.int64)

    def _padded(self, images: torch.Tensor, rows: np.ndarray, step: int) -> Batch:
        missing = self._size - len(rows)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        padding = np.full(missing, -1, np.int64)
        labels = torch.from_numpy(np.concatenate([self._labels[rows], padding]))
        stream = self.images.stream
        labels = stream.upload(labels)
        stream.wait()
        return Batch(ImageViews.whole(images), labels, np.concatenate([rows, padding]), step, len(rows))
