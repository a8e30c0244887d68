"""Rows of a split to pixels: files are read and checked in threads, then decoded batch by batch."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Iterable, NamedTuple, Sequence

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.images.bad_images import BadRows
from fastirt.images.decoders.choose import choose_loader, make_decoder
from fastirt.images.decoders.interface import DECODER_BYTES, Decoder, decoded_bytes, parts
from fastirt.images.decoders.threads import ThreadedDecoder
from fastirt.images.formats.header_check import BadImage, Undecodable
from fastirt.images.packed_store import PackedSplit
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
        # `pack` wrote what `prepare` would return, and the source compares checksums.
        self._prepared = isinstance(source, PackedSplit) and source.orientation == input.orientation
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
        encoded = self.source.read(row)
        if self._prepared:
            return encoded, self.source.size(row)
        return prepare(encoded, self.source.path(row), self.input)


class ImageDecoder:
    """Decodes and resizes at most `batch_size` images at a time, to crops or to whole images."""

    def __init__(self, input: InputConfig, batch_size: int, threads: int, device: torch.device) -> None:
        self.input, self.batch_size, self.threads, self.device = input, batch_size, threads, device
        self._decoder: Decoder | None = None

    def open(self) -> None:
        """Create what `close` releases.

        Call it from the consumer's thread, which must import DALI before the background thread.
        """
        name = choose_loader(self.input.loader, self.device)
        self._decoder = make_decoder(name, self.input, self.batch_size, self.threads, self.device)

    def decode(self, encoded: Sequence[Encoded], crops: Crops | None) -> torch.Tensor:
        """(B, S, S, 3) uint8; crops None: the centers, not flipped. Raises Undecodable.

        Large images are decoded in `parts`.
        """
        sizes, resized = self._sizes(encoded)
        corners, flips = self._placed(resized, crops)
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

    def start(self, encoded: Sequence[Encoded], crops: Crops | None) -> Callable[[], torch.Tensor] | None:
        """Begin to `decode`, behind the batches begun before; the returned function waits for it.

        None where the decoder has no threads of its own, and for large images.
        """
        sizes, resized = self._sizes(encoded)
        if not isinstance(self._decoder, ThreadedDecoder) or 2 * decoded_bytes(sizes, resized).sum() > DECODER_BYTES:
            return None
        return self._decoder.start([data for data, _ in encoded], resized, *self._placed(resized, crops))

    def resume(self) -> None:
        """Go on with a batch that was started behind another one."""
        self._decoder.resume()

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

    def _placed(self, resized: np.ndarray, crops: Crops | None) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) corners and (B,) flips."""
        x, y = (None, None) if crops is None else (crops.x, crops.y)
        flips = np.zeros(len(resized), bool) if crops is None else crops.flip
        return crop_corners(resized, self.input.input_size, x, y), flips

    def _sizes(self, encoded: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) (height, width) before and after the resize."""
        sizes = [size for _, size in encoded]
        return np.array(sizes, np.int64).reshape(-1, 2), resized_sizes(sizes, self.input)


class _Ahead(NamedTuple):
    """A batch that is being decoded before `views` asks for it."""

    rows: list[int]
    crops: Crops | None
    images: Callable[[], torch.Tensor]


class DecodedImages:
    """Images that are decoded for each batch. `CachedImages` keeps them instead.

    A decoder with threads of its own begins with the next batch while it finishes this one, so that
    no thread idles.

    crops_of: the draws that `views` gets for a step; None: the centers.
    """

    def __init__(
        self,
        reader: ImageReader,
        decoder: ImageDecoder,
        bad: BadRows,
        stream: DeviceStream,
        crops_of: Callable[[int], Crops] | None = None,
    ) -> None:
        self.reader, self.decoder, self.bad, self.stream = reader, decoder, bad, stream
        self._crops_of = crops_of
        self._ahead: _Ahead | None = None

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
        wanted, after = rows.tolist(), following.tolist()
        self.reader.submit(wanted + after)
        ahead, self._ahead = self._ahead, None
        failed: dict[int, str] = {}
        try:
            if ahead is not None and ahead.rows == wanted and _same(ahead.crops, crops):
                self.decoder.resume()
            else:
                encoded, failed = self.reader.collect(wanted)
                ahead = None if failed else self._start(wanted, crops, encoded)
            if not failed:
                if ahead is None:
                    images = self.decoder.decode([encoded[row] for row in wanted], crops)
                else:
                    self._ahead = self._start_next(after, step + 1)
                    images = ahead.images()
                self.reader.submit(after)  # frees the bytes of `rows`
                return ImageViews.whole(self.stream.upload(images))
        except Undecodable as error:
            failed = {wanted[i]: reason for i, reason in error.reasons.items()}
        for row, reason in failed.items():
            self.bad.add(row, reason, step)
        return None

    def close(self) -> None:
        self._ahead = None
        self.reader.close()
        self.decoder.close()

    def _start_next(self, rows: list[int], step: int) -> _Ahead | None:
        encoded, failed = self.reader.collect(rows)
        if failed or not rows:  # bad rows are reported when it is their turn
            return None
        return self._start(rows, self._crops_of(step) if self._crops_of else None, encoded)

    def _start(self, rows: list[int], crops: Crops | None, encoded: dict[int, Encoded]) -> _Ahead | None:
        images = self.decoder.start([encoded[row] for row in rows], crops)
        return _Ahead(rows, crops, images) if images is not None else None


def _same(a: Crops | None, b: Crops | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(x, y) for x, y in ((a.x, b.x), (a.y, b.y), (a.flip, b.flip)))
