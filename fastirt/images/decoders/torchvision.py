"""The decoder for CPUs: torchvision decodes JPEGs, Pillow all other formats, and torch resizes.

Decoding and turning upright are bit-identical to Pillow. The resize differs by the precision of its
weights, 16 bits instead of 32: 0.004 of 255 levels on average. It works on rows first, as Pillow
did up to version 12; for images that shrink more in height, 13 works on columns first, which
differs by 0.2 levels. Damaged data that can be decoded are a warning of libjpeg on stderr, without
a name; Pillow is silent.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image

from fastirt.images.decoders import pil
from fastirt.images.decoders.threads import ThreadedDecoder

RGB = 3  # torchvision.io.ImageReadMode.RGB


class TorchvisionDecoder(ThreadedDecoder):
    """A `Decoder` by torchvision and torch. Raises what `check_torchvision` raises."""

    def __init__(self, size: int, threads: int, orientation: str = "stored") -> None:
        check_torchvision()
        super().__init__(size, threads, orientation)

    def crop(self, data: np.ndarray, resized: tuple[int, int], corner: tuple[int, int]) -> np.ndarray:
        top, left = corner
        stop = top + self.size, left + self.size
        return resize(self._decoded(data), resized, stop)[top : stop[0], left : stop[1]]

    def whole(self, data: np.ndarray, resized: tuple[int, int]) -> np.ndarray:
        return resize(self._decoded(data), resized, resized)

    def _decoded(self, data: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8, contiguous."""
        if data[:2].tobytes() != b"\xff\xd8":
            return np.array(pil.decode(data, self.orientation))
        writable = data if data.flags.writeable else data.copy()  # torch warns of read-only memory
        image = torch.ops.image.decode_jpeg(torch.from_numpy(writable), RGB, self.orientation == "exif")
        return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))


def check_torchvision() -> None:
    """Decode a JPEG. Raises any exception where torchvision is missing or lacks libjpeg."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an extension that cannot be loaded
        import torchvision.io  # noqa: F401
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "JPEG")
    torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), RGB, False)


def resize(image: np.ndarray, size: tuple[int, int], needed: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialias, like torchvision's Resize.

    Args:
        image: (H, W, 3) uint8, contiguous.
        size: (height, width) after the resize.
        needed: (rows, columns) of the result, from the first ones on, that the caller uses.

    Returns:
        (rows or more, columns or more, 3) uint8: the upper left part of the resized image.
    """
    height, width, _ = image.shape
    rows, columns = _rows(height, size[0], needed[0]), _columns(width, size[1], needed[1])
    if rows.read == rows.made and columns.read == columns.made:
        return image[: rows.made]
    # Views by numpy: each operation of torch lets go of the GIL, and waits to have it again. Not
    # image[None]: with its stride of 0 torch would not see that channels are last.
    batch = image.reshape(1, height, width, 3)[:, : rows.read]
    channels_last = torch.from_numpy(batch.transpose(0, 3, 1, 2))
    sizes, scales = zip((rows.made, rows.scale), (columns.made, columns.scale))
    resized = torch.ops.aten._upsample_bicubic2d_aa(channels_last, sizes, False, *scales)
    return resized.numpy()[0].transpose(1, 2, 0)


class _Axis(NamedTuple):
    """The first `read` pixels become the first `made` ones of the resized axis.

    torch leaves an axis as it is where both are equal. scale: as torch takes it; None: made / read.
    """

    read: int
    made: int
    scale: Optional[float] = None


def _columns(length: int, resized: int, needed: int) -> _Axis:
    """All columns are read: rows of fewer would not be contiguous."""
    scale = _exact_scale(length, resized)
    # torch rounds weights by the largest one: half of the axis has all weights, since they are
    # symmetric.
    if scale is None or length in (resized, needed) or 2 * needed < resized:
        return _Axis(length, resized)
    return _Axis(length, needed, scale)


def _rows(length: int, resized: int, needed: int) -> _Axis:
    if length == resized:
        return _Axis(needed, needed)
    step = length / resized  # pixels per pixel made; the kernel reaches 2 steps to each side
    read = min(length, math.ceil(step * needed + 2 * max(step, 1)) + 1)
    scale = _exact_scale(length, resized)
    if scale is None or read == needed or 2 * needed < resized:
        return _Axis(length, resized)
    return _Axis(read, needed, scale)


def _exact_scale(length: int, resized: int) -> Optional[float]:
    """A scale whose inverse, which torch computes, is length / resized to the last bit."""
    scale = resized / length
    near = (scale, math.nextafter(scale, 0), math.nextafter(scale, math.inf))
    return next((value for value in near if 1 / value == length / resized), None)
