"""The machine's limits, measured on random data in the run that reports them: bandwidths of copies,
rates of matrix products."""

from __future__ import annotations

import statistics
from typing import Callable

import torch

from benchmarks.timing import time_interleaved
from fastirt.model import onednn_linear

HOST_BYTES = 256 << 20  # of the copy from the host


def ceilings(device: torch.device, quick: bool = False) -> dict[str, list[float]]:
    """Limits by name, a value a repeat.

    "GB/s": of a copy, read and write counted. "bf16", "tf32", "fp32": TFLOP/s of a square product;
    fp32 on a CPU by MKL or oneDNN, whichever is faster.
    "h2d GB/s", on a GPU only: of a copy from page-locked host memory.

    Raises OSError where one of them cannot be measured.
    """
    on_gpu = device.type == "cuda"
    source = torch.empty((2 << 30) if on_gpu else (256 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 512
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()

    def product(precision: str) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                return a @ b
            finally:
                torch.set_float32_matmul_precision(before)

        return call

    calls = {
        "GB/s": lambda: target.copy_(source),
        "bf16": lambda: a16 @ b16,
        "tf32": product("high"),
        "fp32": product("highest"),
    }
    if on_gpu:
        host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
        calls["h2d GB/s"] = lambda: target[:HOST_BYTES].copy_(host, non_blocking=True)
    elif onednn_linear.is_available():
        calls["onednn"] = lambda: onednn_linear.onednn_linear(a, b, None)
    timed = time_interleaved(calls, device, 3 if quick else 10)[0]
    # over milliseconds: the rate
    work = {"GB/s": 2 * source.numel() / 1e6, "h2d GB/s": HOST_BYTES / 1e6}
    work |= dict.fromkeys(("bf16", "tf32", "fp32", "onednn"), 2 * side**3 / 1e9)
    rates: dict[str, list[float]] = {}
    for name, values in timed.items():
        if isinstance(values, str):
            raise OSError(f"{device}: this machine's limit of {name} cannot be measured ({values})")
        rates[name] = [work[name] / value for value in values]
    if "onednn" in rates:
        rates["fp32"] = max(rates["fp32"], rates.pop("onednn"), key=statistics.median)
    return rates
