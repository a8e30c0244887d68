"""What all decoders share: their interface, and limits on the memory of decoded pixels."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Iterator, Protocol, Sequence

import numpy as np
import torch

DECODER_BYTES = 384 * 2**20  # limit of the images that a decoder holds at once
READER_BYTES = 128 * 2**20  # limit of the images that Pillow decodes in reading threads at once
# 512 MiB; an image above its share is decoded alone
DECODED_BYTES = DECODER_BYTES + READER_BYTES

BYTES_PER_PIXEL = 4  # of Pillow's RGB; DALI needs 3


class Decoder(Protocol):
    """Encoded images to uint8 pixels: turned upright if asked, resized, cropped or left whole."""

    def decode(
        self,
        encoded: Sequence[np.ndarray],
        sizes: np.ndarray,
        resized: np.ndarray,
        corners: np.ndarray,
        flips: np.ndarray,
    ) -> torch.Tensor:
        """Decode, resize, crop and flip a batch.

        Args:
            encoded: B files, each (length,) uint8, as `prepare` returns them.
            sizes: (B, 2) int64 height and width in pixels before the resize, once upright.
            resized: (B, 2) int64 height and width after the resize.
            corners: (B, 2) int64 top and left of the S × S crop in the resized image.
            flips: (B,) bool, whether to flip the crop horizontally.

        Returns:
            (B, S, S, 3) uint8 RGB on the decoder's device, ready to use.

        Raises:
            Undecodable: some images are damaged; it names them and the reasons.
        """

    def decode_whole(self, encoded: Sequence[np.ndarray], sizes: np.ndarray, resized: np.ndarray) -> list[torch.Tensor]:
        """Decode and resize without cropping: B images (H, W, 3) uint8. Raises Undecodable."""

    def close(self) -> None:
        """Release threads and buffers."""


def decoded_bytes(sizes: np.ndarray, resized: np.ndarray) -> np.ndarray:
    """(B,) int64 bytes that images take while they are decoded; arguments as for `parts`."""
    return (np.prod(sizes, 1, dtype=np.int64) + np.prod(resized, 1, dtype=np.int64)) * BYTES_PER_PIXEL


def parts(sizes: np.ndarray, resized: np.ndarray) -> list[slice]:
    """Slices of a batch to decode one by one, each of at most DECODER_BYTES or of one image.

    sizes, resized: (B, 2) height and width before and after the resize. A batch of ordinary images
    is one slice.
    """
    needed = decoded_bytes(sizes, resized)
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
    """Lets threads hold `limit` bytes together; a thread that needs more runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._free = limit, limit
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Reserve `amount` bytes in the `with` block; waits until they are free."""
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


# One per process, because training and evaluation may read at the same time.
READERS = ByteBudget(READER_BYTES)
