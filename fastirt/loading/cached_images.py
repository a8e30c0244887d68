"""Images from a decoded cache; those that a batch needs and lacks there are decoded into it."""

from __future__ import annotations

import logging
import time
from typing import Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

from fastirt.images.bad_images import BadRows
from fastirt.images.formats.header_check import Undecodable
from fastirt.images.prepare import Encoded
from fastirt.images.resize_crop import crop_corners
from fastirt.loading.augment import Crops
from fastirt.loading.batch import ImageViews
from fastirt.loading.image_cache import ImageCache, next_missing
from fastirt.loading.image_reader import DecodedImages, ImageDecoder, ImageReader
from fastirt.loading.prefetch import DeviceStream

log = logging.getLogger("fastirt")

LOG_INTERVAL_S = 15.0  # seconds
LOG_SHARE = 0.05  # of all images, that the cache must have gained since the last line


class CachedImages:
    """Images that are decoded once and kept; the views have the pixels of `DecodedImages.views`.

    Each batch decodes its own images, each image once, and `ahead` further ones in catalogue order:
    none on a CPU, where decoding takes the cores of the step. With `ahead` the size of the batch of
    all ranks, each rank's private cache is full by the end of the first epoch. `fill` decodes all
    images at once.
    """

    def __init__(
        self,
        reader: ImageReader,
        decoder: ImageDecoder,
        bad: BadRows,
        stream: DeviceStream,
        cache: ImageCache,
        ahead: int,
    ) -> None:
        self.reader, self.decoder, self.bad, self.stream = reader, decoder, bad, stream
        self.cache = cache
        self.ahead = ahead
        self._next = 0  # every image before this row is in the cache, or bad
        self._logged, self._shown = time.monotonic(), 0  # the last log line, and its number of images

    def open(self) -> None:
        """Start what `close` stops. Call it from the consumer's thread."""
        self.reader.open()
        self.decoder.open()

    def views(self, rows: np.ndarray, crops: Crops, step: int, following: np.ndarray) -> ImageViews | None:
        """As `DecodedImages.views`; None only if one of `rows` is bad, not for a further image."""
        self._decode(self._needed(rows, self.ahead), step)
        if not self.bad.rows.isdisjoint(rows.tolist()):
            return None
        self.reader.submit(self._needed(following, self.ahead))
        cache, size = self.cache, self.reader.input.input_size
        corners = crop_corners(cache.shapes[rows], size, crops.x, crops.y)
        picks = torch.from_numpy(np.column_stack([rows, corners, crops.flip]).astype(np.int64))
        views = ImageViews(cache.pixels, cache.starts, cache.widths, self.stream.upload(picks), size)
        # Copy across the bus now, while an earlier step runs.
        return ImageViews.whole(views.images) if cache.remote else views

    def fill(self, step: int, bar: bool = False) -> Iterator[int]:
        """Decode every image, in catalogue order. Opens and closes by itself. A collective call.

        Yields the number of rows done, after each batch of the decoder.
        step: named in reports of bad rows. bar: show a progress bar on a terminal.
        """
        self.close()
        self.open()
        count = self.ahead or self.decoder.batch_size
        quiet = None if bar else True
        try:
            with tqdm(total=len(self.cache.valid), desc="cache", unit="img", disable=quiet, leave=False) as shown:
                while self._next < len(self.cache.valid):
                    with self.stream.active():
                        self._decode(self._needed((), count), step)
                        self.bad.sync(self.bad.ranks.loader_host)
                        self.reader.submit(self._needed((), count))
                    shown.update(self._next - shown.n)
                    yield self._next
        finally:
            self.close()

    def close(self) -> None:
        self.reader.close()
        self.decoder.close()

    def _needed(self, rows: Sequence[int] | np.ndarray, ahead: int) -> list[int]:
        """Those of `rows` that are not in the cache, then the next `ahead` in catalogue order."""
        missing = [int(row) for row in dict.fromkeys(rows) if not self.cache.valid[row]]
        return missing + next_missing(self.cache, self._next, ahead, self.bad.rows, missing)

    def _decode(self, rows: list[int], step: int) -> None:
        """Read rows and decode them into the cache; unreadable ones are marked bad."""
        if not rows and self._next == len(self.cache.valid):
            return
        self.reader.submit(rows)
        encoded, failed = self.reader.collect(rows)
        for row, reason in failed.items():
            self.bad.add(row, reason, step)
        for row, shape in zip(list(encoded), self.decoder.resized(list(encoded.values()))):
            if tuple(shape) != tuple(self.cache.shapes[row]):
                self.bad.add(row, "has another size than when the run began", step)
                del encoded[row]
        todo = list(encoded)
        while todo:
            count = self.decoder.first_part([encoded[row] for row in todo])
            bad = self._keep(todo[:count], encoded, step)
            todo = [row for row in todo[:count] if row not in bad] + todo[count:] if bad else todo[count:]
        self._advance()

    def _keep(self, rows: list[int], encoded: dict[int, Encoded], step: int) -> set[int]:
        """Decode rows into the cache.

        If some cannot be decoded, marks and returns them, and keeps none.
        """
        try:
            images = self.decoder.decode_whole([encoded[row] for row in rows])
        except Undecodable as error:
            for i, reason in error.reasons.items():
                self.bad.add(rows[i], reason, step)
            return {rows[i] for i in error.reasons}
        for row, image in zip(rows, images):
            self.cache.put(row, image)
        self.stream.wait()
        self.cache.valid[rows] = True
        return set()

    def _advance(self) -> None:
        """Move `_next` past rows that are in the cache or bad, and log the progress."""
        valid, before = self.cache.valid, self._next
        while self._next < len(valid) and (valid[self._next] or self._next in self.bad.rows):
            self._next += 1
        now, total = time.monotonic(), len(valid)
        if before < self._next == total:
            log.info("cache: full, %d images%s", valid.sum(), f", {total - valid.sum()} bad" if not valid.all() else "")
        elif now - self._logged > LOG_INTERVAL_S and valid.sum() - self._shown >= LOG_SHARE * total:
            log.info("cache: %d of %d images", valid.sum(), total)
            self._logged, self._shown = now, int(valid.sum())


class CachedCrops:
    """Center crops for evaluation, decoded once and kept: those of `DecodedImages.views`.

    Args:
        decoded: reads and decodes what is missing.
        cache: room for crops (S, S, 3); it may outlive this object.
        first: row of the split that is the cache's first.
    """

    def __init__(self, decoded: DecodedImages, cache: ImageCache, first: int) -> None:
        self.decoded, self.cache, self.first = decoded, cache, first
        self.bad, self.stream, self.size = decoded.bad, decoded.stream, decoded.reader.input.input_size
        self.open, self.close = decoded.open, decoded.close

    def views(self, rows: np.ndarray, crops: None, step: int, following: np.ndarray) -> ImageViews | None:
        """As `DecodedImages.views` without crops."""
        missing, ahead = (part[~self.cache.valid[part - self.first]] for part in (rows, following))
        if len(missing):
            views = self.decoded.views(missing, None, step, ahead)
            if views is None:
                return None
            for row, image in zip(missing - self.first, views.images):
                self.cache.put(int(row), image)
            self.stream.wait()  # the host may read them below
            self.cache.valid[missing - self.first] = True
            if len(missing) == len(rows):
                return views
        kept = self.cache.pixels.view(-1, self.size, self.size, 3)
        places = rows - self.first
        if places[-1] - places[0] < len(places):  # no bad one among them: not copied
            return ImageViews.whole(self.stream.upload(kept[places[0] : places[-1] + 1]))
        return ImageViews.whole(self.stream.upload(torch.stack([kept[place] for place in places.tolist()])))
