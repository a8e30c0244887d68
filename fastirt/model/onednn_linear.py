"""fp32 linear layers by oneDNN (`--engine onednn`): the same sums, in another order.

torch gives fp32 products to MKL, which has its AVX-512 kernels for Intel's CPUs alone; on AMD's it
takes narrower ones. oneDNN, which torch ships for other types, is 1.5 to 2.3 times as fast there.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from fastirt.model.encoder import Encoder


def is_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.lru_cache
def is_faster() -> bool:
    """Whether this is a CPU with AVX-512 that MKL does not know. Not timed: runs must repeat."""
    if not (is_available() and torch.backends.mkl.is_available()):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*:\s*(\S+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and vendor is not None and vendor[1] == "AuthenticAMD"


def use_onednn(encoder: Encoder, in_evaluation: bool = False) -> None:
    """Make the linear layers of the transformer train by oneDNN; parameters stay what they are.

    in_evaluation: also where the model is not trained.
    """
    for module in encoder.vit.modules():
        if type(module) is nn.Linear:
            module.__class__ = AlwaysOneDnnLinear if in_evaluation else OneDnnLinear


class OneDnnLinear(nn.Linear):
    """`nn.Linear` on a CPU in float32. In evaluation it is torch's own, as in every other run."""

    def forward(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.weight, self.bias) if self.training else super().forward(x)


class AlwaysOneDnnLinear(nn.Linear):
    """The same, in evaluation too: 1.7 times the images a second, vectors within 1e-6."""

    def forward(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed; both may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# Operators of their own, so that the compiler keeps the calls: it would copy transposed operands.
@torch.library.custom_op("fastirt::onednn_linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) or None: float32, on a CPU. Returns (..., N)."""
    return product(x, weight, bias)


@onednn_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("fastirt::onednn_linear_backward", mutates_args=())
def onednn_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (..., K), weight (N, K) and bias (N,)."""
    outputs, inputs = weight.shape
    grad, rows = grad.reshape(-1, outputs), x.reshape(-1, inputs)
    grad_x = product(grad, weight.t()).view(x.shape)
    # oneDNN is slow at a product with more columns than rows.
    if outputs > inputs:
        grad_weight = product(rows.t(), grad.t()).t().contiguous()
    else:
        grad_weight = product(grad.t(), rows.t())
    return grad_x, grad_weight, grad.sum(0)


@onednn_linear_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    grad_x, grad_weight, grad_bias = onednn_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


onednn_linear.register_autograd(_backward, setup_context=_save)
