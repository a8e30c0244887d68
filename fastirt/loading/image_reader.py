"""Images of a split as decoded pixels: read ahead, checked, decoded, replaced or left out."""

from __future__ import annotations

import dataclasses
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Sequence

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images.bad_images import BadImages
from fastirt.images.decode import parts
from fastirt.images.decode_dali import DaliDecoder
from fastirt.images.decode_pil import PilDecoder
from fastirt.images.formats.header_check import BadImage, Undecodable
from fastirt.images.prepare import Encoded, prepare
from fastirt.images.resize_crop import check_input, crop_corners, resized_sizes
from fastirt.images.source import FileSource, ImageSource
from fastirt.loading.batch import Batch
from fastirt.loading.image_cache import ImageViews
from fastirt.loading.prefetch import Prefetch

if TYPE_CHECKING:
    from fastirt.datasets import Split


PREFETCH = 2  # batches ready ahead of the step


class ImageReader:
    """Rows of a split as decoded images; what both loaders share."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        input: InputConfig,
        device: torch.device,
        store: ImageSource | None,
        csv_path: Path | None,
        bad: Iterable[int],
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        check_input(input)
        self.ranks = ranks
        self.split, self.batch_size, self.input, self.device = split, batch_size, input, torch.device(device)
        self.source = FileSource(split.paths) if store is None else store
        self.labels = np.asarray(split.labels, np.int64)
        self.registry = BadImages(csv_path, input.max_bad, ranks.is_main)
        self._found: list[tuple[int, str, int]] = []  # bad (row, reason, step) that other ranks have not heard of
        self.bad = frozenset(int(row) for row in bad)  # replaced, never mutated: other threads read it
        self.threads = ranks.threads(input.num_workers)
        self._pool: ThreadPoolExecutor | None = None
        self._decoder: DaliDecoder | PilDecoder | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def open(self) -> None:
        """Create what `close` releases. Call it from the consumer's thread: DALI must be imported before the worker thread starts."""
        size, orientation = self.input.input_size, self.input.orientation
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastirt-read")
        if self.input.loader == "pil":
            self._decoder = PilDecoder(size, self.threads, orientation)
        else:
            self._decoder = DaliDecoder(size, self.batch_size, self.threads, self.device, orientation=orientation)

    def start_reading(self, rows: Iterable[int]) -> dict[int, "Future[Encoded]"]:
        """Begins to read, check and prepare; each future gives the bytes and size of its row or raises BadImage."""
        return {row: self._pool.submit(self._read, row) for row in dict.fromkeys(int(row) for row in rows)}

    def finish_reading(
        self, reading: dict[int, "Future[Encoded]"], rows: Iterable[int], step: int
    ) -> tuple[dict[int, Encoded], list[int]]:
        """What could be read of `rows`, and the rows newly found bad, which are reported."""
        encoded, lost = {}, []
        for row in dict.fromkeys(int(row) for row in rows):
            try:
                encoded[row] = reading[row].result()
            except BadImage as bad:
                lost.append(row)
                self.mark_bad(row, bad.reason, step)
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

    def mark_bad(self, row: int, reason: str, step: int) -> None:
        """Mark a row bad and report it (distributed: at the next `agree`)."""
        self.bad |= {row}
        if self.ranks.is_distributed:
            self._found.append((row, reason, step))
        else:
            self.registry.add(self.source.path(row), reason, step)

    def agree(self, thread: str = "input") -> set[int]:
        """All-gather newly found bad rows; returns their union. A collective call."""
        if not self.ranks.is_distributed:
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
        images: torch.Tensor | ImageViews,
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
            if views.cache.remote:  # across the bus now, while an earlier step runs
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

    _reader: ImageReader
    _running: "weakref.ref[Prefetch[Batch]] | None" = None  # weak: a consumer that leaves its loop ends the run

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._reader.open()
        batches = Prefetch(self._on_stream(), PREFETCH)
        self._running = weakref.ref(batches)
        return self._owned(batches) if self._reader.device.type == "cuda" else batches

    @property
    def bad(self) -> set[int]:
        """Rows of the split known to be unreadable."""
        return set(self._reader.bad)

    def close(self) -> None:
        """Stops the background thread and frees what it used. Iterating again starts afresh."""
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._reader.close()

    def _on_stream(self) -> Iterator[Batch]:
        with self._reader.on_stream():
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
