"""FLOPs of a training step and peak FLOP/s of a device, for the model FLOP utilization (MFU)."""

from __future__ import annotations

import copy
import time

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

PROBE_SECONDS = 0.3  # the fastest product in this time counts: a CPU first raises its clock


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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in `dtype`: from the data sheet for known GPUs, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, bf16, fp32 in PEAKS:
            if part in name:
                return (bf16 if dtype == torch.bfloat16 else fp32) * 1e12
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    fastest, ends = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < ends or fastest == float("inf"):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest
