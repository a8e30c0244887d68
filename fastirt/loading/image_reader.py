"""Rows of a split to pixels: files are read and checked in threads, then decoded batch by batch."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Iterable, Sequence

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.images.bad_images import BadRows
from fastirt.images.decode import Decoder, parts
from fastirt.images.decode_dali import DaliDecoder
from fastirt.images.decode_pil import PilDecoder
from fastirt.images.formats.header_check import BadImage, Undecodable
from fastirt.images.prepare import Encoded, prepare
from fastirt.images.resize_crop import check_input, crop_corners, resized_sizes
from fastirt.images.source import ImageSource
from fastirt.loading.augment import Crops
from fastirt.loading.batch import ImageViews
from fastirt.loading.prefetch import DeviceStream


class ImageReader:
    """Reads, checks and prepares encoded images in threads, ahead of the decoder."""

    def __init__(self, source: ImageSource, input: InputConfig, threads: int) -> None:
        """Raises UserError for sizes from which no crop can be taken."""
        check_input(input)
        self.source, self.input, self.threads = source, input, threads
        self._pool: ThreadPoolExecutor | None = None
        self._reading: dict[int, Future[Encoded]] = {}

    def open(self) -> None:
        """Start the threads that `close` ends."""
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastirt-read")

    def submit(self, rows: Iterable[int]) -> None:
        """Begin to read `rows`, in this order, and forget all others.

        Rows among them that were submitted before are not read again.
        """
        before, self._reading = self._reading, {}
        for row in rows:
            if row not in self._reading:
                self._reading[row] = before[row] if row in before else self._pool.submit(self._read, row)

    def collect(self, rows: Iterable[int]) -> tuple[dict[int, Encoded], dict[int, str]]:
        """Wait for submitted rows.

        Returns bytes and size by readable row, and the reason by bad row.
        """
        encoded, failed = {}, {}
        for row in dict.fromkeys(rows):
            try:
                encoded[row] = self._reading[row].result()
            except BadImage as bad:
                failed[row] = bad.reason
        return encoded, failed

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._reading = None, {}

    def _read(self, row: int) -> Encoded:
        return prepare(self.source.read(row), self.source.path(row), self.input)


class ImageDecoder:
    """Decodes and resizes at most `batch_size` images at a time, to crops or to whole images."""

    def __init__(self, input: InputConfig, batch_size: int, threads: int, device: torch.device) -> None:
        self.input, self.batch_size, self.threads, self.device = input, batch_size, threads, device
        self._decoder: Decoder | None = None

    def open(self) -> None:
        """Create what `close` releases.

        Call it from the consumer's thread, which must import DALI before the background thread.
        """
        size, orientation = self.input.input_size, self.input.orientation
        if self.input.loader == "pil":
            self._decoder = PilDecoder(size, self.threads, orientation)
        else:
            self._decoder = DaliDecoder(size, self.batch_size, self.threads, self.device, orientation=orientation)

    def decode(self, encoded: Sequence[Encoded], crops: Crops | None) -> torch.Tensor:
        """(B, S, S, 3) uint8; crops None: the centers, not flipped. Raises Undecodable.

        Large images are decoded in `parts`.
        """
        sizes, resized = self._sizes(encoded)
        x, y = (None, None) if crops is None else (crops.x, crops.y)
        corners = crop_corners(resized, self.input.input_size, x, y)
        flips = np.zeros(len(encoded), bool) if crops is None else crops.flip
        stretches, images = parts(sizes, resized), []
        failed: dict[int, str] = {}
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

    def decode_whole(self, encoded: Sequence[Encoded]) -> list[torch.Tensor]:
        """Images (H, W, 3) uint8, resized and not cropped. Raises Undecodable."""
        return self._decoder.decode_whole([data for data, _ in encoded], *self._sizes(encoded))

    def first_part(self, encoded: Sequence[Encoded]) -> int:
        """How many images, from the first on, `decode_whole` can take at once."""
        return parts(*self._sizes(encoded[: self.batch_size]))[0].stop

    def resized(self, encoded: Sequence[Encoded]) -> np.ndarray:
        """(B, 2) int64 (height, width) after the resize."""
        return self._sizes(encoded)[1]

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None

    def _sizes(self, encoded: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) (height, width) before and after the resize."""
        sizes = [size for _, size in encoded]
        return np.array(sizes, np.int64).reshape(-1, 2), resized_sizes(sizes, self.input)


class DecodedImages:
    """Images that are decoded for each batch. `CachedImages` keeps them instead."""

    def __init__(self, reader: ImageReader, decoder: ImageDecoder, bad: BadRows, stream: DeviceStream) -> None:
        self.reader, self.decoder, self.bad, self.stream = reader, decoder, bad, stream

    def open(self) -> None:
        """Start what `close` stops. Call it from the consumer's thread."""
        self.reader.open()
        self.decoder.open()

    def views(self, rows: np.ndarray, crops: Crops | None, step: int, following: np.ndarray) -> ImageViews | None:
        """The images of `rows`, cropped and flipped; None if one of them is added to `bad`.

        Args:
            rows: (B,) int64.
            crops: B draws; None: the centers, not flipped.
            step: named in reports of bad rows.
            following: rows of the next call; they are read while these are decoded. The bytes of
                `rows` are freed: a retry, after another rank found a bad image, reads them again.
        """
        wanted = rows.tolist()
        self.reader.submit(wanted + following.tolist())
        encoded, failed = self.reader.collect(wanted)
        if not failed:
            try:
                images = self.decoder.decode([encoded[row] for row in wanted], crops)
            except Undecodable as error:
                failed = {wanted[i]: reason for i, reason in error.reasons.items()}
            else:
                self.reader.submit(following.tolist())  # frees the bytes of `rows`
                return ImageViews.whole(self.stream.upload(images))
        for row, reason in failed.items():
            self.bad.add(row, reason, step)
        return None

    def close(self) -> None:
        self.reader.close()
        self.decoder.close()
