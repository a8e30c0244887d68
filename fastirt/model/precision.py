"""The dtype that the encoder computes in."""

from __future__ import annotations

import contextlib

import torch


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the encoder's matrix products; "auto": bfloat16 on a GPU, float32 on a CPU."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if precision == "fp32" else torch.bfloat16


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast with fp32 weights (no loss scaling); no context for float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
