"""The reference for the other decoders: Pillow decodes and resizes; slower."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastirt.images.decoders.threads import ThreadedDecoder
from fastirt.images.formats.pillow import open_image, rgb


class PilDecoder(ThreadedDecoder):
    """A `Decoder` by Pillow."""

    def crop(self, data: np.ndarray, resized: tuple[int, int], corner: tuple[int, int]) -> np.ndarray:
        top, left = corner
        return self.whole(data, resized)[top : top + self.size, left : left + self.size]

    def whole(self, data: np.ndarray, resized: tuple[int, int]) -> np.ndarray:
        return resize(decode(data, self.orientation), *resized)


def decode(encoded: np.ndarray, orientation: str = "stored") -> Image.Image:
    """The image as RGB, upright with orientation "exif". Raises any of Pillow's exceptions."""
    with open_image(encoded.tobytes()) as image:
        return rgb(image, orientation)


def resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8, bicubic with antialias like torchvision's Resize."""
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))
