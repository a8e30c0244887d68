"""Linear layers with all three products in float8: forward, gradient of the input, of the weight.

Only for measuring. Each operand is scaled by its largest element (Micikevicius et al. 2022, "FP8
Formats for Deep Learning", without their history of maxima): activations and weights to e4m3,
gradients to e5m2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastirt.model.encoder import Encoder


def scaled(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values / scale in `dtype`, 0-d float32 scale): the largest element becomes the maximum."""
    scale = values.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (values.float() / scale).to(dtype), scale


def product(a: Tensor, b: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype) -> Tensor:
    """A B^T of (M, K) and (N, K): (M, N) bfloat16. M, N and K are multiples of 16."""
    (a8, a_scale), (b8, b_scale) = scaled(a.contiguous(), a_dtype), scaled(b.contiguous(), b_dtype)
    return torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, torch.float8_e4m3fn, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        to_rows = product(gradient, weight.t(), torch.float8_e5m2, torch.float8_e4m3fn)
        to_weight = product(gradient.t(), rows.t(), torch.float8_e5m2, torch.float8_e4m3fn)
        return to_rows.to(rows.dtype), to_weight.to(weight.dtype)


class Float8Linear(nn.Linear):
    """`nn.Linear` with float8 products; its output is bfloat16."""

    def forward(self, values: Tensor) -> Tensor:
        out = _Linear.apply(values.flatten(0, -2), self.weight).unflatten(0, values.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


def float8_blocks(encoder: Encoder) -> None:
    """Turn all linear layers of the transformer's blocks into Float8Linear; the weights stay."""
    for layer in encoder.vit.get_submodule("blocks").modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Float8Linear
