"""The momentum encoder (MoCo, He et al. 2020): a moving average of the encoder."""

from __future__ import annotations

import copy
from typing import Optional

import torch
from torch import Tensor

from fastirt.model.encoder import Encoder


def make_twin(encoder: Encoder) -> Encoder:
    """A copy without gradients, updated by `momentum_update`.

    It stays in training mode, drop path included, like the public code's.
    """
    twin = copy.deepcopy(encoder).requires_grad_(False)
    return twin.train()


@torch.no_grad()
def momentum_update(twin: Encoder, encoder: Encoder, momentum: float, hold: Optional[Tensor] = None) -> None:
    """twin <- momentum * twin + (1 - momentum) * encoder, without synchronizing the device.

    hold: 0-d bool tensor; if true, the parameters stay as they are.
    """
    averages, weights = list(twin.parameters()), list(encoder.parameters())
    if hold is None:
        torch._foreach_lerp_(averages, weights, 1 - momentum)
    else:
        steps = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(steps, (1 - momentum) * (~hold).float())
        torch._foreach_add_(averages, steps)
    for target, source in zip(twin.buffers(), encoder.buffers()):
        target.copy_(source)
