"""Decoding image by image, in threads: what the decoders by torchvision and Pillow share."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastirt.images.formats.header_check import Undecodable
from fastirt.images.formats.structure import complaint

# torch starts further threads for an operation on more elements, and they compete for the cores.
SERIAL_ELEMENTS = 2**15


class ThreadedDecoder(ABC):
    """A `Decoder` on the CPU whose threads each decode one image at a time.

    They work from `start` or `resume` on until a batch is waited for and complete, and stop then,
    also amid the next batch: on a CPU the cores belong to the training step.

    Args:
        size: side S of the crops in pixels.
        threads: number of threads.
        orientation: "exif" turns images upright, "stored" leaves them as they are.
    """

    def __init__(self, size: int, threads: int, orientation: str = "stored") -> None:
        self.size, self.threads, self.orientation = size, threads, orientation
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastirt-decode")
        self._todo: deque[Callable[[], None]] = deque()  # one an image, of all batches in their order
        self._resting = False
        self._buffers = Buffers()

    @abstractmethod
    def crop(self, data: np.ndarray, resized: tuple[int, int], corner: tuple[int, int]) -> np.ndarray:
        """The S × S crop at `corner` of `whole`: (S, S, 3) uint8. May raise any exception."""

    @abstractmethod
    def whole(self, data: np.ndarray, resized: tuple[int, int]) -> np.ndarray:
        """The decoded image, resized to (height, width): (H, W, 3) uint8. May raise any
        exception.
        """

    def decode(
        self,
        encoded: Sequence[np.ndarray],
        sizes: np.ndarray,
        resized: np.ndarray,
        corners: np.ndarray,
        flips: np.ndarray,
    ) -> Tensor:
        """As `Decoder.decode`, on the CPU."""
        return self.start(encoded, resized, corners, flips)()

    def start(
        self, encoded: Sequence[np.ndarray], resized: np.ndarray, corners: np.ndarray, flips: np.ndarray
    ) -> Callable[[], Tensor]:
        """Begin to `decode`; the returned function waits for the batch.

        The threads work on batches in the order of these calls.
        """
        pixels = self._buffers.take((len(encoded), self.size, self.size, 3))
        images = torch.from_numpy(pixels)  # refers to `pixels` as long as any view of it lives
        targets, places, flipped = resized.tolist(), corners.tolist(), flips.tolist()

        def one(i: int) -> None:
            _copy(pixels[i], self.crop(encoded[i], targets[i], places[i]), flipped[i])

        wait = self._for_each(one, len(encoded))
        return lambda: wait() or images

    def decode_whole(self, encoded: Sequence[np.ndarray], sizes: np.ndarray, resized: np.ndarray) -> list[Tensor]:
        """As `Decoder.decode_whole`, on the CPU."""
        images: list[Any] = [None] * len(encoded)
        targets = resized.tolist()

        def one(i: int) -> None:
            images[i] = self.whole(encoded[i], targets[i])

        self._for_each(one, len(encoded))()
        return [torch.from_numpy(image) for image in images]

    def resume(self) -> None:
        """Let the threads go on with the batches that were started."""
        self._resting = False
        for _ in range(self.threads):
            self._pool.submit(self._work)

    def close(self) -> None:
        self._todo.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _work(self) -> None:
        while not self._resting:
            try:
                task = self._todo.popleft()
            except IndexError:
                return
            task()

    def _for_each(self, function: Callable[[int], None], count: int) -> Callable[[], None]:
        """Call function(0) to function(count - 1) in the threads.

        Returns a function that waits for them; it raises Undecodable.
        """
        done: list[int] = []
        failed: dict[int, str] = {}
        complete = threading.Event()

        def call(i: int) -> None:
            try:
                function(i)
            except Exception as error:  # decoders raise nearly anything on a broken image
                failed[i] = complaint(error)
            done.append(i)
            if len(done) == count:
                complete.set()

        def wait() -> None:
            if count:
                complete.wait()
            self._resting = True
            if failed:
                raise Undecodable(dict(sorted(failed.items())))

        self._todo.extend(partial(call, i) for i in range(count))
        self.resume()
        return wait


class Buffers:
    """Memory for batches, given again once nothing refers to it.

    New memory costs a page fault for every 4 KiB, about 5 % of the time to decode a batch.
    """

    LIMIT = 8  # buffers kept: batches being decoded, waiting, and in the step

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        probe = [np.empty(0)]
        self._alone = sys.getrefcount(probe[0])  # of an object that only a list holds

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uninitialized uint8 memory. Call it from one thread."""
        self._kept = [buffer for buffer in self._kept if buffer.shape == shape]
        for i in range(len(self._kept)):
            if sys.getrefcount(self._kept[i]) <= self._alone:
                return self._kept[i]
        new = np.empty(shape, np.uint8)
        if len(self._kept) < self.LIMIT:
            self._kept.append(new)
        return new


def _copy(out: np.ndarray, image: np.ndarray, flip: bool) -> None:
    """Copy an image (H, W, 3) into `out`, flipped horizontally if asked, in the calling thread."""
    if not flip:
        np.copyto(out, image)
        return
    rows = max(1, SERIAL_ELEMENTS // (3 * out.shape[1]))
    channels_first = image.transpose(2, 0, 1)  # torch flips channels-last images by vectors
    stripes = [torch.from_numpy(channels_first[:, top : top + rows]).flip(2) for top in range(0, len(out), rows)]
    np.concatenate([stripe.numpy().transpose(1, 2, 0) for stripe in stripes], out=out)
