"""The momentum encoder (MoCo, He et al. 2020): a moving average of the encoder."""

from __future__ import annotations

import copy
from typing import Optional

import torch
from torch import Tensor

from fastirt.model.encoder import Encoder


def make_momentum_encoder(encoder: Encoder) -> Encoder:
    """A copy that only `momentum_update` moves.

    It stays in training mode, drop path included, as in the public re-implementation.
    """
    return copy.deepcopy(encoder).requires_grad_(False).train()


@torch.no_grad()
def momentum_update(
    momentum_encoder: Encoder, encoder: Encoder, momentum: float, skip: Optional[Tensor] = None
) -> None:
    """momentum_encoder <- momentum * momentum_encoder + (1 - momentum) * encoder.

    He et al. 2020, eq. 2. Does not synchronize the device. skip: 0-d bool tensor; if true, the
    parameters stay as they are.
    """
    keys, queries = list(momentum_encoder.parameters()), list(encoder.parameters())
    if skip is None:
        torch._foreach_lerp_(keys, queries, 1 - momentum)
    else:
        moved = torch._foreach_sub(queries, keys)
        torch._foreach_mul_(moved, (1 - momentum) * (~skip).float())
        torch._foreach_add_(keys, moved)
    for key, query in zip(momentum_encoder.buffers(), encoder.buffers()):
        key.copy_(query)
