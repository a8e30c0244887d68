"""The plain twin of the DALI pipeline: PIL decodes and resizes, numpy crops and flips. Slower, and easy to believe."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Sequence

import numpy as np
import torch
from PIL import Image

from fastirt.input.check import Undecodable


class PilDecoder:
    """Encoded pictures to a batch, in `threads` threads."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastirt-pil")

    def decode(
        self,
        encoded: Sequence[np.ndarray],
        sizes: np.ndarray,
        resized: np.ndarray,
        corners: np.ndarray,
        flips: np.ndarray,
    ) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the CPU; sizes (B, 2) as stored and after the resize, corners (B, 2) of the crops, flips (B,) bool.
        Raises Undecodable."""

        def one(data: np.ndarray, size: np.ndarray, corner: np.ndarray, flip: bool) -> np.ndarray:
            (top, left), pixels = corner, resize(decode(data), *size)
            pixels = pixels[top : top + self.size, left : left + self.size]
            return pixels[:, ::-1] if flip else pixels

        return torch.from_numpy(np.stack(self._all(one, encoded, resized, corners, flips)))

    def decode_whole(self, encoded: Sequence[np.ndarray], sizes: np.ndarray, resized: np.ndarray) -> list[torch.Tensor]:
        """Pictures (H, W, 3) uint8 on the CPU, resized and not cropped. Raises Undecodable."""
        return [
            torch.from_numpy(p) for p in self._all(lambda data, size: resize(decode(data), *size), encoded, resized)
        ]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _all(self, function: Callable[..., np.ndarray], *columns: Sequence) -> list[np.ndarray]:
        def tried(*row: Any) -> np.ndarray | str:
            try:
                return function(*row)
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more, by format and damage
                return reason(error)

        results = list(self._pool.map(tried, *columns))
        failed = {i: result for i, result in enumerate(results) if isinstance(result, str)}
        if failed:
            raise Undecodable(failed)
        return results


def decode(encoded: np.ndarray) -> Image.Image:
    """The whole picture as RGB. Raises what PIL raises."""
    with Image.open(io.BytesIO(encoded.tobytes()), formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
        return image.convert("RGB")


def resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8, bicubic with antialias."""
    return np.array(image.resize((int(width), int(height)), Image.Resampling.BICUBIC))


def reason(error: Exception) -> str:
    """A decoder's complaint in one line."""
    return " ".join(f"cannot be decoded: {error}".split())[:200]
