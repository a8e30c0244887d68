"""The momentum encoder of MoCo: a copy that follows the encoder."""

from __future__ import annotations

import copy
from typing import Optional

import torch
from torch import Tensor

from fastirt.model.encoder import Encoder


def make_twin(encoder: Encoder) -> Encoder:
    """A copy that is moved by `momentum_update` alone. It stays in training mode, drop path included, as the public code's does."""
    twin = copy.deepcopy(encoder).requires_grad_(False)
    return twin.train()


@torch.no_grad()
def momentum_update(twin: Encoder, encoder: Encoder, momentum: float, hold: Optional[Tensor] = None) -> None:
    """twin <- momentum * twin + (1 - momentum) * encoder; not where the 0-d bool tensor `hold` is true. No synchronisation."""
    theirs, ours = list(twin.parameters()), list(encoder.parameters())
    if hold is None:
        torch._foreach_lerp_(theirs, ours, 1 - momentum)
    else:
        moved = torch._foreach_sub(ours, theirs)
        torch._foreach_mul_(moved, (1 - momentum) * (~hold).float())
        torch._foreach_add_(theirs, moved)
    for mine, other in zip(twin.buffers(), encoder.buffers()):
        mine.copy_(other)
