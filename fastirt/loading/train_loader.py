"""Pictures to batches on the device: reading, checking, decoding and replacing, in the background."""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Sequence

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.distributed.ranks import ALONE, Ranks
from fastirt.errors import UserError
from fastirt.images.bad_images import BadPictures
from fastirt.images.decode_dali import DaliDecoder
from fastirt.images.decode_memory import parts
from fastirt.images.decode_pil import PilDecoder
from fastirt.images.formats.header_check import BadPicture, Undecodable
from fastirt.images.prepare import Encoded, prepare
from fastirt.images.resize_crop import check_input, crop_corners, resized_sizes
from fastirt.images.source import FileSource, PictureSource
from fastirt.loading.augment import draw_crops
from fastirt.loading.image_cache import Views
from fastirt.loading.prefetch import Prefetch
from fastirt.loading.sampler import make_sampler

if TYPE_CHECKING:
    from fastirt.datasets import Split

PREFETCH = 2  # batches ready ahead of the step


@dataclass
class Batch:
    """images (B, S, S, 3) uint8 and labels (B,) int64 on the device; indices (B,) int64 rows of the split; rows from `valid` on are
    padding: black, with label and index -1. Where pictures are cached, `views` says which and how cropped, and images is None.
    With many ranks this is one's slice; `whole` is then the rows of the batch of all."""

    images: torch.Tensor | None
    labels: torch.Tensor
    indices: np.ndarray
    step: int
    valid: int
    views: Views | None = None
    whole: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def size(self) -> int:
        """S, in pixels."""
        return self.views.size if self.images is None else self.images.shape[1]

    def pixels(self) -> torch.Tensor:
        """(B, S, S, 3) uint8, wherever they are kept."""
        return self.views.pixels() if self.images is None else self.images


class _Pictures:
    """Rows of a split as decoded pictures; what both loaders share."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        input: InputConfig,
        device: torch.device,
        store: PictureSource | None,
        csv_path: Path | None,
        bad: Iterable[int],
        ranks: Ranks = ALONE,
    ) -> None:
        check_input(input)
        self.ranks = ranks
        self.split, self.batch_size, self.input, self.device = split, batch_size, input, torch.device(device)
        self.source = FileSource(split.paths) if store is None else store
        self.labels = np.asarray(split.labels, np.int64)
        self.registry = BadPictures(csv_path, input.max_bad, ranks.first)
        self._found: list[tuple[int, str, int]] = []  # bad (row, reason, step) that other ranks have not heard of
        self.bad = frozenset(int(row) for row in bad)  # replaced, never mutated: other threads read it
        self.threads = ranks.threads(input.num_workers)
        self._pool: ThreadPoolExecutor | None = None
        self._decoder: DaliDecoder | PilDecoder | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def open(self) -> None:
        """Makes what `close` takes down. In the consumer's thread, so that libraries are imported before the other one starts."""
        size, orientation = self.input.input_size, self.input.orientation
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastirt-read")
        if self.input.loader == "pil":
            self._decoder = PilDecoder(size, self.threads, orientation)
        else:
            self._decoder = DaliDecoder(size, self.batch_size, self.threads, self.device, orientation=orientation)

    def start_reading(self, rows: Iterable[int]) -> dict[int, "Future[Encoded]"]:
        """Begins to read, check and prepare; each future gives the bytes and size of its row or raises BadPicture."""
        return {row: self._pool.submit(self._read, row) for row in dict.fromkeys(int(row) for row in rows)}

    def finish_reading(
        self, reading: dict[int, "Future[Encoded]"], rows: Iterable[int], step: int
    ) -> tuple[dict[int, Encoded], list[int]]:
        """What could be read of `rows`, and the rows newly found bad, which are reported."""
        encoded, lost = {}, []
        for row in dict.fromkeys(int(row) for row in rows):
            try:
                encoded[row] = reading[row].result()
            except BadPicture as bad:
                lost.append(row)
                self.mark(row, bad.reason, step)
        return encoded, lost

    def decode(
        self,
        encoded: Sequence[Encoded],
        x: np.ndarray | None = None,
        y: np.ndarray | None = None,
        flip: np.ndarray | None = None,
    ) -> torch.Tensor:
        """(B, S, S, 3) uint8; draws None: the centre crop, not flipped. Large images are decoded in `parts`. Raises Undecodable."""
        sizes, resized = self._sizes(encoded)
        corners = crop_corners(resized, self.input.input_size, x, y)
        flips = np.zeros(len(encoded), bool) if flip is None else flip
        stretches, images, failed = parts(sizes, resized), [], {}
        for part in stretches:
            data = [data for data, _ in encoded[part]]
            try:
                batch = self._decoder.decode(data, sizes[part], resized[part], corners[part], flips[part])
            except Undecodable as error:
                failed |= {part.start + i: reason for i, reason in error.reasons.items()}
            else:  # a copy, so that DALI can use the memory of one part for the next
                images.append(batch if len(stretches) == 1 else batch.clone())
        if failed:
            raise Undecodable(failed)
        return images[0] if len(images) == 1 else torch.cat(images)

    def mark(self, row: int, reason: str, step: int) -> None:
        """Takes a row out of use and names it; on many ranks it is named when they `agree`."""
        self.bad |= {row}
        if self.ranks.many:
            self._found.append((row, reason, step))
        else:
            self.registry.add(self.source.path(row), reason, step)

    def agree(self, thread: str = "input") -> set[int]:
        """Tell the other ranks which rows were found bad since the last call, and hear of theirs: all new ones. Called by all ranks."""
        if not self.ranks.many:
            return set()
        found, self._found = self._found, []
        new: dict[int, tuple[str, int]] = {}
        for told in self.ranks.gather_json(found, thread):
            for row, reason, step in told:
                new.setdefault(row, (reason, step))
        self.bad |= new.keys()
        for row, (reason, step) in new.items():
            self.registry.add(self.source.path(row), reason, step)
        return set(new)

    def resized(self, encoded: dict[int, Encoded]) -> dict[int, tuple[int, int]]:
        """Row to (height, width) after the resize."""
        return dict(zip(encoded, map(tuple, self._sizes(encoded.values())[1].tolist())))

    def first_part(self, encoded: Sequence[Encoded]) -> int:
        """How many images, from the first on, `decode_whole` may be given at once."""
        return parts(*self._sizes(encoded[: self.batch_size]))[0].stop

    def decode_whole(self, encoded: Sequence[Encoded]) -> list[torch.Tensor]:
        """Images (H, W, 3) uint8, resized and not cropped. Raises Undecodable."""
        return self._decoder.decode_whole([data for data, _ in encoded], *self._sizes(encoded))

    def _sizes(self, encoded: Iterable[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) (height, width) before and after the resize."""
        sizes = [size for _, size in encoded]
        return np.array(sizes, np.int64).reshape(-1, 2), resized_sizes(sizes, self.input)

    def batch(
        self,
        images: torch.Tensor | Views,
        labels: np.ndarray,
        indices: np.ndarray,
        step: int,
        valid: int,
        whole: np.ndarray | None = None,
    ) -> Batch:
        """On the device, complete: nobody has to wait for a copy later."""
        tensor, views = self._upload(torch.from_numpy(np.ascontiguousarray(labels))), None
        if isinstance(images, torch.Tensor):
            images = self._upload(images)
        else:
            images, views = None, dataclasses.replace(images, picks=self._upload(images.picks))
            if views.pictures.remote:  # across the bus now, while an earlier step runs
                images, views = views.pixels(), None
        self.wait()
        return Batch(images, tensor, indices, step, valid, views, whole)

    def wait(self) -> None:
        """Until the device has done all that the background work gave it."""
        if self._stream is not None:
            self._stream.synchronize()

    def _upload(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stream is None or tensor.device.type != "cpu":
            return tensor
        return (tensor.pin_memory() if self.input.pin_mem else tensor).to(self.device, non_blocking=True)

    def on_stream(self) -> torch.cuda.StreamContext:
        """Background work stays off the stream on which the model runs; does nothing on the CPU."""
        return torch.cuda.stream(self._stream)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._decoder is not None:
            self._decoder.close()
        self._pool = self._decoder = None

    def _read(self, row: int) -> Encoded:
        return prepare(self.source.read(row), self.source.path(row), self.input)


class _Loader:
    """Runs `_batches` in the background, one run at a time."""

    _pictures: _Pictures
    _running: "weakref.ref[Prefetch[Batch]] | None" = None  # weak: a consumer that leaves its loop ends the run

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._pictures.open()
        batches = Prefetch(self._on_stream(), PREFETCH)
        self._running = weakref.ref(batches)
        return self._owned(batches) if self._pictures.device.type == "cuda" else batches

    @property
    def bad(self) -> set[int]:
        """Rows of the split known to be unreadable."""
        return set(self._pictures.bad)

    def close(self) -> None:
        """Stops the background thread and frees what it used. Iterating again starts afresh."""
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._pictures.close()

    def _on_stream(self) -> Iterator[Batch]:
        with self._pictures.on_stream():
            yield from self._batches()

    @staticmethod
    def _owned(batches: Prefetch[Batch]) -> Iterator[Batch]:
        """Tells torch's allocator that the consumer's stream uses what another stream allocated."""
        for batch in batches:
            for tensor in (batch.labels, batch.views.picks if batch.images is None else batch.images):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
            yield batch

    def _batches(self) -> Iterator[Batch]:
        raise NotImplementedError


class TrainLoader(_Loader):
    """Batches for start_step, start_step + 1, … up to stop_step (exclusive; None: endless).

    Batch `step` is a function of (seed, step, which pictures are bad), whatever the number of threads and wherever the run began.
    m = 0: shuffled epochs, else m pictures per class. `store`: where pictures are read from, default their files. `bad`: rows known to be
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
        store: PictureSource | None = None,
        bad: Iterable[int] = (),
        csv_path: Path | None = None,
        class_names: Sequence[str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        first, count = ranks.slice(batch_size)
        self._pictures = _Pictures(split, count, input, device, store, csv_path, bad, ranks)
        self._sampler = make_sampler(split.labels, batch_size, m, seed)
        self._slice, self._whole = slice(first, first + count), batch_size
        self._seed, self._start, self._stop, self._class_names = seed, start_step, stop_step, class_names

    def _batches(self) -> Iterator[Batch]:
        step, reading = self._start, {}
        while self._stop is None or step < self._stop:
            yield self._finish(step, reading)
            step += 1

    def _finish(self, step: int, reading: dict[int, "Future[Encoded]"]) -> Batch:
        """Reads and decodes one batch, again and again with replacements until no picture of it is bad; begins to read the next."""
        pictures, own = self._pictures, self._slice
        crops = draw_crops(self._seed, step, self._whole)[own]
        while True:
            whole = self._sampler.batch(step, pictures.bad)
            rows = whole[own]
            reading.update(pictures.start_reading(row for row in rows.tolist() if row not in reading))
            encoded, lost = pictures.finish_reading(reading, rows, step)
            if not lost:
                following = pictures.start_reading(self._sampler.batch(step + 1, pictures.bad)[own])
                try:
                    images = pictures.decode([encoded[row] for row in rows.tolist()], crops.x, crops.y, crops.flip)
                except Undecodable as error:
                    lost = sorted({int(rows[i]) for i in error.reasons})
                    for i, reason in error.reasons.items():
                        pictures.mark(int(rows[i]), reason, step)
            lost = sorted(pictures.agree().union(lost).intersection(whole.tolist()))
            if not lost:
                reading.clear()
                reading.update(following)
                return pictures.batch(images, pictures.labels[rows], rows, step, len(rows), whole)
            self._name_lost_classes(lost)

    def _name_lost_classes(self, lost: Sequence[int]) -> None:
        if not self._pictures.ranks.first:  # all lose the same ones
            return
        labels, bad = self._pictures.labels, self._pictures.bad
        for label in sorted({int(labels[row]) for row in lost}):
            if bad.issuperset(np.flatnonzero(labels == label).tolist()):
                name = (
                    self._class_names[label]
                    if self._class_names
                    else os.path.dirname(self._pictures.source.path(lost[0]))
                )
                logging.getLogger("fastirt").warning(
                    "class %d (%s) has no readable picture left: it leaves the sampler", label, name
                )


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
        store: PictureSource | None = None,
        csv_path: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--eval-batch-size {batch_size}: must be at least 1")
        batches = max(1, -(-len(split) // batch_size))
        size = max(1, -(-len(split) // batches))
        self._pictures = _Pictures(split, size, input, device, store, csv_path, (), ranks)

    def __len__(self) -> int:
        """Number of batches of all ranks, if none is lost."""
        return -(-len(self._pictures.split) // self._pictures.batch_size)

    @property
    def own(self) -> range:
        """This rank's batches."""
        ranks = self._pictures.ranks
        return range(len(self) * ranks.rank // ranks.size, len(self) * (ranks.rank + 1) // ranks.size)

    def agree(self) -> None:
        """Name what any rank could not read. Called by all ranks, after the last batch."""
        self._pictures.agree("control")

    def _batches(self) -> Iterator[Batch]:
        pictures, size = self._pictures, self._pictures.batch_size

        def start(step: int) -> dict[int, "Future[Encoded]"]:
            rows = range(step * size, min((step + 1) * size, len(pictures.split)))
            return pictures.start_reading(row for row in rows if row not in pictures.bad)

        following = start(self.own.start) if self.own else {}
        for step in self.own:
            reading, following = following, start(step + 1) if step + 1 in self.own else {}
            encoded, _ = pictures.finish_reading(reading, reading, step)
            while encoded:
                try:
                    images = pictures.decode(list(encoded.values()))
                except Undecodable as error:
                    rows = list(encoded)
                    for i, reason in error.reasons.items():
                        encoded.pop(rows[i])
                        pictures.mark(rows[i], reason, step)
                else:
                    yield self._padded(images, np.fromiter(encoded, np.int64), step)
                    break

    def _padded(self, images: torch.Tensor, rows: np.ndarray, step: int) -> Batch:
        missing = self._pictures.batch_size - len(rows)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        pad = np.full(missing, -1, np.int64)
        labels = np.concatenate([self._pictures.labels[rows], pad])
        return self._pictures.batch(images, labels, np.concatenate([rows, pad]), step, len(rows))
