"""The preprocessing of an evaluation for a user's own loader."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastirt.config.options import InputConfig
from fastirt.images.normalize import byte_table
from fastirt.images.resize_crop import crop_corners
from fastirt.inference.memory_source import check_image, resized, to_rgb


class Transform:
    """A PIL image or uint8 array to the encoder's input; can be pickled, for loaders' processes.

    Where `--loader` is torchvision, its resize is taken, else Pillow's.
    """

    def __init__(self, input: InputConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        self.input, self.mean, self.std = input, tuple(mean), tuple(std)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """(3, S, S) float32: upright, resized, center-cropped and normalized.

        Raises UserError for another type, and any of Pillow's exceptions for a broken image.
        """
        check_image(image, "image")
        whole = resized(to_rgb(image, self.input), image, self.input)
        size = self.input.input_size
        top, left = crop_corners(np.array([whole.shape[:2]]), size)[0]
        crop = torch.from_numpy(np.ascontiguousarray(whole[top : top + size, left : left + size]))
        table = byte_table(self.mean, self.std, torch.float32, torch.device("cpu"))
        return torch.stack([table[crop[..., channel].long(), channel] for channel in range(3)])

    def __repr__(self) -> str:
        side = self.input.resize_size
        resize = f"{side} x {side}" if self.input.resize == "square" else f"shorter side {side}"
        return f"Transform(resize {resize}, crop {self.input.input_size}, mean {self.mean}, std {self.std})"
