"""Limits on the memory that decoded pixels take, however large the images of a batch are."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Iterator

import numpy as np

DECODER_BYTES = 384 * 2**20  # of the images that a decoder holds at once
READER_BYTES = 128 * 2**20  # of the images that Pillow decodes in the reading threads at once
DECODED_BYTES = DECODER_BYTES + READER_BYTES  # 512 MiB; a single image larger than its share is decoded alone

BYTES_PER_PIXEL = 4  # Pillow's RGB; DALI's is 3


def parts(sizes: np.ndarray, resized: np.ndarray) -> list[slice]:
    """Consecutive stretches of a batch to decode one after the other: each holds at most DECODER_BYTES, or one image.

    sizes, resized (B, 2): before and after the resize. A batch of ordinary images is one part.
    """
    needed = (np.prod(sizes, 1, dtype=np.int64) + np.prod(resized, 1, dtype=np.int64)) * BYTES_PER_PIXEL
    if needed.sum() <= DECODER_BYTES:
        return [slice(0, len(needed))]
    starts, held = [0], 0
    for i, bytes in enumerate(needed.tolist()):
        if held and held + bytes > DECODER_BYTES:
            starts.append(i)
            held = 0
        held += bytes
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(needed)])]


class ByteBudget:
    """Lets threads hold at most `limit` bytes at once; one that needs more than that waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._free = limit, limit
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        amount = min(amount, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


READERS = ByteBudget(READER_BYTES)  # one for the process: training and evaluation may read at the same time
