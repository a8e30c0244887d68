"""The reference for the DALI decoder: Pillow decodes and resizes, numpy crops and flips; slower."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Sequence

import numpy as np
import torch
from PIL import Image

from fastirt.images.formats.header_check import Undecodable
from fastirt.images.formats.pillow import open_image, rgb
from fastirt.images.formats.structure import complaint


class PilDecoder:
    """A `Decoder` by Pillow, on the CPU in `threads` threads.

    size: side S of the crops in pixels. orientation: "exif" turns images upright, "stored" leaves
    them as they are.
    """

    def __init__(self, size: int, threads: int, orientation: str = "stored") -> None:
        self.size, self.orientation = size, orientation
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastirt-pil")

    def decode(
        self,
        encoded: Sequence[np.ndarray],
        sizes: np.ndarray,
        resized: np.ndarray,
        corners: np.ndarray,
        flips: np.ndarray,
    ) -> torch.Tensor:
        """As `Decoder.decode`, on the CPU."""

        def one(data: np.ndarray, size: np.ndarray, corner: np.ndarray, flip: bool) -> np.ndarray:
            (top, left), pixels = corner, resize(decode(data, self.orientation), *size)
            pixels = pixels[top : top + self.size, left : left + self.size]
            return pixels[:, ::-1] if flip else pixels

        return torch.from_numpy(np.stack(self._all(one, encoded, resized, corners, flips)))

    def decode_whole(self, encoded: Sequence[np.ndarray], sizes: np.ndarray, resized: np.ndarray) -> list[torch.Tensor]:
        """As `Decoder.decode_whole`, on the CPU."""

        def one(data: np.ndarray, size: np.ndarray) -> np.ndarray:
            return resize(decode(data, self.orientation), *size)

        return [torch.from_numpy(pixels) for pixels in self._all(one, encoded, resized)]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _all(self, function: Callable[..., np.ndarray], *columns: Sequence) -> list[np.ndarray]:
        def tried(*row: Any) -> np.ndarray | str:
            try:
                return function(*row)
            except Exception as error:  # Pillow raises nearly anything on a broken image
                return complaint(error)

        results = list(self._pool.map(tried, *columns))
        failed = {i: result for i, result in enumerate(results) if isinstance(result, str)}
        if failed:
            raise Undecodable(failed)
        return results


def decode(encoded: np.ndarray, orientation: str = "stored") -> Image.Image:
    """The image as RGB, upright with orientation "exif". Raises any of Pillow's exceptions."""
    with open_image(encoded.tobytes()) as image:
        return rgb(image, orientation)


def resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8, bicubic with antialias like torchvision's Resize."""
    return np.array(image.resize((int(width), int(height)), Image.Resampling.BICUBIC))
