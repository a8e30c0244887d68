"""What the counts are, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_VALUES = 2**24  # similarities held at once: 128 MiB


def count_similarities_reference(query: Tensor, gallery: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `count_similarities`: similarities are inner products in float64.

    A similarity with a vector that has a NaN or an infinity is NaN, and is in no count.
    """
    query, gallery = (vectors.double() + vectors.double() * 0 for vectors in (query, gallery))  # infinity becomes NaN
    above = torch.zeros(low.shape, dtype=torch.int32, device=query.device)
    within = torch.zeros_like(above)
    block = max(1, BLOCK_VALUES // max(1, len(gallery)))
    for rows in torch.arange(len(query), device=query.device).split(block):
        similarity = query[rows] @ gallery.T
        for r in range(low.shape[1]):
            lowest, highest = low[rows, r, None], high[rows, r, None]
            above[rows, r] = (similarity > highest).sum(1, dtype=torch.int32)
            within[rows, r] = ((similarity >= lowest) & (similarity <= highest)).sum(1, dtype=torch.int32)
    return above, within
