"""The machine's own limits, measured where the benchmark runs: copy bandwidths and matrix products on random data."""

from __future__ import annotations

import torch

from benchmarks.timing import samples

COPIED = 256 << 20  # bytes from the host


def ceilings(device: torch.device, quick: bool = False) -> dict[str, list[float]]:
    """By name, one value a repeat: "GB/s" of a copy (read + write), TFLOP/s of square products "bf16", "tf32", "fp32";
    on a GPU "h2d GB/s", of a copy from page-locked host memory."""
    on_gpu = device.type == "cuda"
    source = torch.empty((2 << 30) if on_gpu else (256 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 512
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()

    def product(precision: str):
        def call():
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                return a @ b
            finally:
                torch.set_float32_matmul_precision(before)

        return call

    calls = {
        "GB/s": lambda: target.copy_(source), "bf16": lambda: a16 @ b16, "tf32": product("high"), "fp32": product("highest"),
    }  # fmt: skip
    if on_gpu:
        host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
        calls["h2d GB/s"] = lambda: target[:COPIED].copy_(host, non_blocking=True)
    timed = samples(calls, device, 3 if quick else 10)[0]
    done = {"GB/s": 2 * source.numel() / 1e6, "h2d GB/s": COPIED / 1e6}
    done |= dict.fromkeys(("bf16", "tf32", "fp32"), 2 * side**3 / 1e9)
    for name, values in timed.items():
        if isinstance(values, str):
            raise OSError(f"{device}: this machine's limit of {name} cannot be measured ({values})")
    return {name: [done[name] / value for value in values] for name, values in timed.items()}
