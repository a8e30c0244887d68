"""The machine's own limits, measured where the benchmark runs: copy bandwidth and matrix products on random data."""

from __future__ import annotations

import torch

from benchmarks.timing import alternate


def ceilings(device: torch.device, repeats: int = 10) -> dict[str, float]:
    """GB/s of a copy (read + write), and TFLOP/s of square products by precision: "bf16", "tf32", "fp32"."""
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

    timed = alternate(
        {"copy": lambda: target.copy_(source), "bf16": lambda: a16 @ b16, "tf32": product("high"), "fp32": product("highest")},
        device, repeats,
    )  # fmt: skip
    rates = {name: 2 * side**3 / timed[name].median / 1e9 for name in ("bf16", "tf32", "fp32")}
    return {"GB/s": 2 * source.numel() / timed["copy"].median / 1e6, **rates}
