"""Training batches: rows are drawn and their images loaded; rows with bad images are replaced."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Protocol, Sequence

import numpy as np
import torch

from fastirt.config.options import Config
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images.bad_images import BadRows
from fastirt.images.source import FileSource, ImageSource
from fastirt.loading.augment import Crops, draw_crops
from fastirt.loading.batch import Batch, ImageViews
from fastirt.loading.cache_budget import make_cache
from fastirt.loading.cached_images import CachedImages
from fastirt.loading.image_cache import ImageCache
from fastirt.loading.image_reader import DecodedImages, ImageDecoder, ImageReader
from fastirt.loading.prefetch import BackgroundLoader, DeviceStream, Images
from fastirt.loading.sampler import Sampler, make_sampler

if TYPE_CHECKING:
    from fastirt.datasets import Catalog

log = logging.getLogger("fastirt")


class TrainImages(Images, Protocol):
    """Rows to views: `DecodedImages`, or `CachedImages`."""

    def views(self, rows: np.ndarray, crops: Crops, step: int, following: np.ndarray) -> ImageViews | None: ...


class TrainLoader(BackgroundLoader):
    """Batches of start_step up to stop_step (exclusive), made ahead of a GPU's step.

    Batch `step` is a function of (seed, step, which images are bad). It depends neither on the
    number of threads nor on start_step. Each rank gets its slice of the batch of all ranks.
    `train_loader` builds a loader from the config of a run. Nothing is read before the first
    iteration.

    Args:
        sampler: draws the rows of each batch of all ranks; the crops are drawn with its seed.
        images: turns rows into views of images, decoded for each batch or cached.
        start_step: step of the first batch.
        stop_step: the step after the last batch; None: endless.
        class_names: by label, for messages; None: the folder of a class's first image is named.

    Raises:
        UserError: while iterating, if more than `--max-bad` images are unreadable, or if too few
            are left for a batch.
    """

    images: TrainImages

    def __init__(
        self,
        sampler: Sampler,
        images: TrainImages,
        *,
        start_step: int = 0,
        stop_step: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(images)
        self.sampler = sampler
        first, count = images.bad.ranks.batch_slice(sampler.batch_size)
        self._slice = slice(first, first + count)
        self._steps = start_step, stop_step
        self._class_names = class_names

    @property
    def cache(self) -> ImageCache | None:
        """The decoded images, if they are kept."""
        return self.images.cache if isinstance(self.images, CachedImages) else None

    def batches(self) -> Iterator[Batch]:
        step, stop = self._steps
        while stop is None or step < stop:
            yield self._batch(step)
            step += 1

    def _batch(self, step: int) -> Batch:
        """Draw and load a batch until none of its images is bad on any rank."""
        sampler, images, bad, own = self.sampler, self.images, self.images.bad, self._slice
        crops = draw_crops(sampler.seed, step, sampler.batch_size)[own]
        while True:
            whole, following = sampler.batch(step, bad.rows), sampler.batch(step + 1, bad.rows)
            rows = whole[own]
            views = images.views(rows, crops, step, following[own])
            lost = bad.sync(bad.ranks.loader_host).intersection(whole.tolist())
            if not lost:
                labels = images.stream.upload(torch.from_numpy(sampler.labels[rows]))
                images.stream.wait()  # the batch is complete: the step need not wait for a copy
                return Batch(views, labels, rows, step, len(rows), whole)
            self._warn_of_empty_classes(lost)

    def _warn_of_empty_classes(self, lost: Iterable[int]) -> None:
        """On rank 0, name each class of these rows that has no readable image left."""
        bad, labels = self.images.bad, self.sampler.labels
        if not bad.ranks.is_main:
            return
        for label in np.unique(labels[list(lost)]).tolist():
            members = np.flatnonzero(labels == label).tolist()
            if bad.rows.issuperset(members):
                folder = os.path.dirname(bad.source.path(members[0]))
                name = self._class_names[label] if self._class_names else folder
                log.warning("class %d (%s) has no readable image left: it leaves the sampler", label, name)


def train_loader(
    catalog: Catalog,
    config: Config,
    device: torch.device,
    *,
    start_step: int = 0,
    bad: Sequence[int] = (),
    store: ImageSource | None = None,
    csv_path: Path | None = None,
    cache: ImageCache | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainLoader:
    """The training batches of a run, up to `--max-iter`, cached as `--cache` says.

    Args:
        catalog: its training split is loaded.
        config: of the run: `data.m`, `input`, `optim.batch_size`, `optim.max_iter`, `run.seed`.
        device: where batches go.
        start_step: step of the first batch.
        bad: rows known to be unreadable, from a checkpoint.
        store: a packed store's training split; None: the image files are read.
        csv_path: a `bad_pictures.csv` that lists unreadable images; None: they are only logged.
        cache: of an earlier loader of the same images and preprocessing; None: as `--cache` says.
        ranks: the ranks that share each batch; all must call this function.

    Raises:
        UserError: settings are impossible, or `--cache device` or `host` does not fit.
    """
    split, input, batch_size = catalog.train, config.input, config.optim.batch_size
    source = FileSource(split.paths) if store is None else store
    if cache is None:
        cache = make_cache(input.cache, source, input, device, frozenset(bad), ranks)
    threads, (first, own) = ranks.threads(input.num_workers), ranks.batch_slice(batch_size)
    reader, decoder = ImageReader(source, input, threads), ImageDecoder(input, own, threads, device)
    rows, stream = BadRows(source, csv_path, input.max_bad, bad, ranks), DeviceStream(device, input.pin_mem)
    ahead = batch_size if device.type == "cuda" else 0

    def crops_of(step: int) -> Crops:
        return draw_crops(config.run.seed, step, batch_size)[first : first + own]

    images: TrainImages = (
        DecodedImages(reader, decoder, rows, stream, crops_of)
        if cache is None
        else CachedImages(reader, decoder, rows, stream, cache, ahead)
    )
    return TrainLoader(
        make_sampler(split.labels, batch_size, config.data.m, config.run.seed),
        images,
        start_step=start_step,
        stop_step=config.optim.max_iter,
        class_names=catalog.class_names,
    )
