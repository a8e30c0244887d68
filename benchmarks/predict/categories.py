"""What part of a training step a kernel belongs to, by its name. Standard library only."""

from __future__ import annotations

import re

PRODUCTS, FP8_PRODUCTS, PATCHES = "matrix products", "matrix products, fp8", "patch embedding"
ATTENTION, ATTENTION_BACKWARD = "attention forward", "attention backward"
LOSS, INPUT = "loss", "input (gather)"
NORM_GRADIENTS = "layer norm backward: gradients of scale and shift"
CAST = re.compile(r"_to_copy(_convolution)?(_t)?(_view)?_\d+")


def triton_category(name: str, backward: bool) -> str:
    """Of a kernel that Inductor generated and named after what it fuses."""
    words = name.split("_fused_")[-1]
    if re.fullmatch(r"\d+", words):
        kind = "reductions" if name.startswith("triton_red") else "elementwise"
        return f"combined {kind}, {'backward' if backward else 'forward'}"
    if "layer_norm" in words:
        if not backward:
            return "layer norm forward (+ residual)"
        by_row = name.startswith("triton_per")
        return "layer norm backward (+ residual)" if by_row else NORM_GRADIENTS
    if "gelu_backward" in words:
        return "bias gradients" if "sum" in words else "GELU backward"
    if "gelu" in words:
        return "GELU forward"
    if any(word in words for word in ("stack", "clone", "cat")):
        return "attention layout (dq, dk, dv to one)" if backward else "other"
    if "sum" in words:
        return "bias gradients"
    if backward and CAST.fullmatch(words) and "view" in words:  # for the next products
        return "activation gradient casts fp32 to bf16"
    if CAST.fullmatch(words):
        return "gradient casts bf16 to fp32" if backward else "weight casts fp32 to bf16"
    return "other"


def extern_category(name: str) -> str:
    """Of a kernel that a library has: cuBLAS, cuDNN, flash attention."""
    if "attention" in name:
        return ATTENTION_BACKWARD if "backward" in name else ATTENTION
    if "convolution" in name:
        return PATCHES
    if "_scaled_mm" in name:
        return FP8_PRODUCTS
    return PRODUCTS if re.search(r"mm\b", name) else "other"


def eager_category(name: str, tensors: int, moved: float) -> str:
    """Of an operator outside the compiled graphs. tensors: that it reads; moved: bytes."""
    if "_fused_adam" in name:
        return "AdamW"
    if "_foreach_norm" in name or "linalg_vector_norm" in name or ("stack" in name and tensors > 20):
        return "gradient norm"
    if "_foreach_copy" in name:
        return "bf16 copies of weights and gradients"
    if name.startswith("aten._foreach"):
        return "momentum encoder" if moved > 1e6 else "AdamW"
    return "small eager operators"


def own_category(name: str) -> str:
    """Of the project's own Triton kernels."""
    return INPUT if "gather" in name else LOSS
