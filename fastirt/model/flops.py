"""FLOPs of a training step and peak FLOP/s of a GPU, for the model FLOP utilization (MFU)."""

from __future__ import annotations

import copy
from typing import Optional

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastirt.model.encoder import Encoder

# From NVIDIA's data sheets: (part of the device's name, dense bf16 TFLOP/s, fp32 without tf32)
PEAKS = (
    ("GB200", 2450.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
)


def training_flops(encoder: Encoder, momentum_encoder: bool = False) -> int:
    """Floating-point operations per image of a training step, 27.6 G for DeiT-S at 224 pixels.

    Forward plus twice that for backward, and one forward more with a `momentum_encoder`.
    Counts matrix products, attention included, on the meta device; 0 if an operator has no
    formula.
    """
    vit = copy.deepcopy(encoder.vit).to("meta").eval()
    image = torch.empty(1, 3, encoder.input_size, encoder.input_size, device="meta")
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            vit.forward_features(image)
    except (NotImplementedError, RuntimeError):  # an operator without a meta implementation
        return 0
    return counter.get_total_flops() * (4 if momentum_encoder else 3)


def peak_flops(device: torch.device, dtype: torch.dtype) -> Optional[float]:
    """FLOP/s of matrix products in `dtype` by the data sheet; None for a CPU or another GPU.

    No product is timed instead: on a shared machine the step was faster than the probe.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, bf16, fp32 in PEAKS:
            if part in name:
                return (bf16 if dtype == torch.bfloat16 else fp32) * 1e12
    return None
