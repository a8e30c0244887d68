"""The preprocessing of an evaluation for a user's own loader."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastirt.config.options import InputConfig
from fastirt.images.decoders import pil, torchvision
from fastirt.images.formats.pillow import rgb
from fastirt.images.normalize import byte_table
from fastirt.images.resize_crop import crop_corners, resized_size
from fastirt.inference.memory_source import to_pil


class Transform:
    """A PIL image or uint8 array to the encoder's input; can be pickled, for loaders' processes.

    Where `--loader` is torchvision, its resize is taken, else Pillow's.
    """

    def __init__(self, input: InputConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        self.input, self.mean, self.std = input, tuple(mean), tuple(std)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """(3, S, S) float32: upright, resized, center-cropped and normalized."""
        if isinstance(image, np.ndarray):
            image = to_pil(image)
        pixels = rgb(image, self.input.orientation)
        height, width = resized_size(pixels.height, pixels.width, self.input.resize, self.input.resize_size)
        if self.input.loader == "torchvision":
            resized = torchvision.resize(np.array(pixels), (height, width), (height, width))
        else:
            resized = pil.resize(pixels, height, width)
        size = self.input.input_size
        top, left = crop_corners(np.array([[height, width]]), size)[0]
        crop = torch.from_numpy(np.ascontiguousarray(resized[top : top + size, left : left + size]))
        table = byte_table(self.mean, self.std, torch.float32, torch.device("cpu"))
        return torch.stack([table[crop[..., channel].long(), channel] for channel in range(3)])

    def __repr__(self) -> str:
        side = self.input.resize_size
        resize = f"{side} x {side}" if self.input.resize == "square" else f"shorter side {side}"
        return f"Transform(resize {resize}, crop {self.input.input_size}, mean {self.mean}, std {self.std})"
