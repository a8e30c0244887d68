"""Vectors as the matrix products of the kernels take them: cast or rounded once, before any tile.

Matrix instructions ignore the last 13 bits of a float32 operand. For "tf32" the vectors must
therefore be rounded before, as cuBLAS does; else every similarity is too small, by 4e-4 on average.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.kernels.checks import choose_impl, resolve_precision

TF32_BITS = 13  # of float32's 23 fraction bits that tf32 does not have


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 x (any shape), each number rounded to the nearest of tf32.

    Ties go away from 0, as with PTX's cvt.rna.tf32.f32. Four launches where nothing fuses them.
    """
    half, kept = 1 << (TF32_BITS - 1), -(1 << TF32_BITS)
    rounded = (x.view(torch.int32) + half).bitwise_and_(kept)
    return torch.where(x == x, rounded.view(torch.float32), x)  # a NaN of all ones would become -0


def product_operand(vectors: Tensor, precision: str) -> Tensor:
    """vectors (N, D) of any float dtype as the products of a resolved precision take them.

    Returns bfloat16 for "bf16", else float32, for "tf32" rounded to it; without gradient.
    """
    vectors = vectors.detach()
    if precision == "bf16":
        return vectors.to(torch.bfloat16)
    if precision == "tf32" and vectors.dtype == torch.float32:
        return round_to_tf32(vectors)
    return vectors.float()  # 16-bit numbers are exact in tf32


def columns_for_products(vectors: Tensor, precision: str, impl: str, rows: Optional[Tensor] = None) -> Tensor:
    """vectors (N, D) as columns for `pair_stats`, `pair_grad` or the memory of `contrastive_koleo`.

    These take columns as they are, since a copy of a large memory would cost as much as the pass.
    precision, impl: as given to them. rows: that these columns will meet, if they are of another
        dtype, on which `auto` depends. Unchanged but for Triton: the others take float32.
    """
    if choose_impl(impl, vectors) != "triton":
        return vectors
    return product_operand(vectors, resolve_precision(precision, vectors, rows))


def drops_bits(precision: str, impl: str, vectors: Tensor) -> bool:
    """Whether products of float32 vectors (N, D) ignore bits: then stored ones must be rounded."""
    return choose_impl(impl, vectors) == "triton" and resolve_precision(precision, vectors) == "tf32"
