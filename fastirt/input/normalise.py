"""uint8 pictures to what the encoder takes."""

from __future__ import annotations

from functools import lru_cache
from typing import Sequence

import torch


def normalise(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(B, S, S, 3) uint8 to (B, 3, S, S) `dtype` in channels-last memory: (x / 255 - mean) / std, computed in float32."""
    scale, shift = _constants(tuple(mean), tuple(std), images.device)
    return torch.addcmul(shift, images.float(), scale).to(dtype).permute(0, 3, 1, 2)


@lru_cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) on the device, made once: a copy from the host in every step would stall it."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    return scale, torch.tensor([-m / s for m, s in zip(mean, std)], device=device)
