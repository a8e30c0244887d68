"""How much arithmetic a step takes, and how much the device could do: model FLOP utilisation (MFU)."""

from __future__ import annotations

import copy
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastirt.model.encoder import Encoder

# Dense products without sparsity, TFLOP/s, from NVIDIA's data sheets: (part of the device's name, bf16, fp32 as tf32 off)
PEAKS = (
    ("GB200", 2450.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
)

PROBE_SECONDS = 0.3  # the fastest of the products in this time: a CPU first has to raise its clock


def training_flops(encoder: Encoder, twin: bool = False) -> int:
    """Floating-point operations for one image in a training step: forward, twice that for the backward, and the twin's forward.

    Products only, attention included, counted on the meta device. DeiT-S at 224: 27.6 G. 0 for a model that cannot be counted.
    """
    vit = copy.deepcopy(encoder.vit).to("meta").eval()
    image = torch.empty(1, 3, encoder.input_size, encoder.input_size, device="meta")
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            vit.forward_features(image)
    except (NotImplementedError, RuntimeError):  # an operator that knows no shapes
        return 0
    return counter.get_total_flops() * (4 if twin else 3)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device's matrix products in `dtype`: the data sheet's for GPUs known here, else measured on a product."""
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
