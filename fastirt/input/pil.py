"""The plain twin of the DALI pipeline: PIL decodes, resizes the source window and flips. Slower, and easy to believe."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Sequence

import numpy as np
import torch
from PIL import Image

from fastirt.input.check import Undecodable


class PilDecoder:
    """Encoded pictures and their source windows to a batch, in `threads` threads."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastirt-pil")

    def decode(self, encoded: Sequence[np.ndarray], windows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the CPU; windows (B, 4) as `source_windows` gives them, flips (B,) bool. Raises Undecodable."""
        results = list(self._pool.map(self._one, encoded, windows, flips))
        failed = {i: result for i, result in enumerate(results) if isinstance(result, str)}
        if failed:
            raise Undecodable(failed)
        return torch.from_numpy(np.stack(results))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, encoded: np.ndarray, window: np.ndarray, flip: bool) -> np.ndarray | str:
        try:
            return view(decode(encoded), window, self.size, bool(flip))
        except (
            Exception
        ) as error:  # PIL raises OSError, SyntaxError, ValueError and more, depending on format and damage
            return reason(error)


def decode(encoded: np.ndarray) -> Image.Image:
    """The whole picture as RGB. Raises what PIL raises."""
    with Image.open(io.BytesIO(encoded.tobytes()), formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
        return image.convert("RGB")


def view(image: Image.Image, window: np.ndarray, size: int, flip: bool) -> np.ndarray:
    """(S, S, 3) uint8: what resizing the whole picture, cropping and flipping gives."""
    top, left, bottom, right = window
    box = (max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def reason(error: Exception) -> str:
    """A decoder's complaint in one line."""
    return " ".join(f"cannot be decoded: {error}".split())[:200]
