"""uint8 images to normalized input of the encoder, by a table: the same bits on every device."""

from __future__ import annotations

from functools import lru_cache
from typing import Sequence

import torch
from torch import Tensor

from fastirt.kernels.gather import gather_views, look_up


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(x / 255 - mean) / std, computed in float32.

    images: (B, S, S, 3) uint8. Returns (B, 3, S, S) of `dtype` in channels-last memory.
    """
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    table = byte_table(tuple(mean), tuple(std), dtype, images.device)
    if images.is_cuda:
        gather_views(out, images.reshape(-1), *whole_views(len(images), images.shape[1], images.device), table)
    else:
        look_up(images, table, out)
    return out.permute(0, 3, 1, 2)


@lru_cache
def byte_table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 3) of `dtype`: normalized value of each byte by channel, computed on the CPU."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std)])
    return (torch.arange(256)[:, None] * scale + shift).to(dtype).to(device)


@lru_cache(maxsize=8)
def whole_views(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, widths, picks) for `gather_views` that show `count` images (size, size, 3) whole."""
    with torch.inference_mode(False):  # what evaluation makes, training takes from the cache
        rows = torch.arange(count)
        picks = torch.zeros(count, 4, dtype=torch.int64)
        picks[:, 0] = rows
        starts, widths = rows * (size * size * 3), torch.full_like(rows, size)
        # Blocking copies: the next caller may be a thread whose work is on another CUDA stream.
        return starts.to(device), widths.to(device), picks.to(device)
