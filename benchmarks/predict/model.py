"""What a step's kernels should take on a GPU: arithmetic on a kernel list, not a measurement.

A kernel takes the longest of three times: its bytes at the bandwidth that copies reach, its
operations at the rate of its category, and the least that a kernel in a CUDA graph takes. Kernels
run one after the other. Not priced: gaps between them, launches from the host, the input. So it is
a best case: expect 10 to 25 % less. Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Iterable

from benchmarks.predict.categories import ATTENTION, ATTENTION_BACKWARD, FP8_PRODUCTS, PATCHES

# The shares are of data-sheet values and were found on an H200; other GPUs are given the same.
# Of the bandwidth: a copy, read and write counted, ran at 4.3 of 4.8 TB/s (measured).
BANDWIDTH_SHARE = 4.3 / 4.8
# Of bf16 products: a large square product of random data ran at 790 of 989.4 TFLOP/s (measured).
PEAK_SHARE = 790 / 989.4
# Of that: products of a ViT-S, such as 12,608 x 384 by 384 x 1,536. Assumed.
PRODUCT_SHARE = 0.75
# Rate of fp8 products over bf16, from the data sheets of H100 and H200.
FP8_RATE = 2
# The shortest time of a kernel in a CUDA graph, microseconds. Assumed.
KERNEL_US = 2.0
# Of bf16 products: 200 and 160 TFLOP/s. Assumed, from FlashAttention at long sequences (Dao 2023)
# and the share of its tiles of 128 that 197 tokens fill, (197 / 256)^2 = 59 %.
ATTENTION_SHARE = 200 / 989.4
ATTENTION_BACKWARD_SHARE = 160 / 989.4
# Of bf16 products: 200 TFLOP/s, since cuDNN pads an image's three channels to eight. Assumed.
PATCH_SHARE = 200 / 989.4


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values of a SXM module: bandwidth in TB/s, dense bf16 products in TFLOP/s."""

    name: str
    bandwidth: float
    bf16: float
    has_fp8: bool

    @property
    def bytes_per_us(self) -> float:
        return self.bandwidth * 1e6 * BANDWIDTH_SHARE

    def flops_per_us(self, category: str) -> float:
        shares = {
            ATTENTION: ATTENTION_SHARE,
            ATTENTION_BACKWARD: ATTENTION_BACKWARD_SHARE,
            PATCHES: PATCH_SHARE,
            FP8_PRODUCTS: FP8_RATE * PEAK_SHARE * PRODUCT_SHARE,
        }
        return self.bf16 * 1e6 * shares.get(category, PEAK_SHARE * PRODUCT_SHARE)


# NVIDIA's data sheets: H200 (2024), H100 (2023), A100 80GB (2021); bf16 rates without sparsity.
GPUS = {
    "H200": Gpu("H200", 4.8, 989.4, True),
    "H100": Gpu("H100", 3.35, 989.4, True),
    "A100": Gpu("A100", 2.039, 312.0, False),
}


@dataclass
class Cost:
    """Sums over kernels."""

    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    us: float = 0.0

    def add(self, kernel: dict[str, Any], us: float) -> None:
        """Add all `count` of a kernel that takes `us`."""
        count = kernel["count"]
        self.launches += count * kernel["launches"]
        self.bytes += count * kernel["bytes"]
        self.flops += count * kernel["flops"]
        self.us += count * us


def kernel_us(kernel: dict[str, Any], gpu: Gpu) -> float:
    """Microseconds of one kernel of a list (see `kernel_list`)."""
    moved = kernel["bytes"] / gpu.bytes_per_us
    computed = kernel["flops"] / gpu.flops_per_us(kernel["category"])
    return max(moved, computed, KERNEL_US * kernel["launches"])


def can_run(kernels: Iterable[dict[str, Any]], gpu: Gpu) -> bool:
    """Whether the GPU has the number formats of these kernels."""
    return gpu.has_fp8 or all(kernel["category"] != FP8_PRODUCTS for kernel in kernels)


def by_category(kernels: Iterable[dict[str, Any]], gpu: Gpu) -> dict[str, Cost]:
    """Longest first."""
    costs: dict[str, Cost] = defaultdict(Cost)
    for kernel in kernels:
        costs[kernel["category"]].add(kernel, kernel_us(kernel, gpu))
    return dict(sorted(costs.items(), key=lambda item: -item[1].us))


def total(kernels: Iterable[dict[str, Any]], gpu: Gpu) -> Cost:
    cost = Cost()
    for kernel in kernels:
        cost.add(kernel, kernel_us(kernel, gpu))
    return cost


def category_table(kernels: list[dict[str, Any]], gpu: Gpu) -> str:
    """Markdown: launches, MB, GFLOP and microseconds by category, and their sum."""
    whole = total(kernels, gpu)
    lines = ["| kernels | launches | MB | GFLOP | us | share |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, cost in [*by_category(kernels, gpu).items(), ("all", whole)]:
        cells = [f"{cost.launches}", *(f"{v:,.0f}" for v in (cost.bytes / 1e6, cost.flops / 1e9, cost.us))]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * cost.us / whole.us:.1f} % |")
    return "\n".join(lines)


def kernel_table(kernels: list[dict[str, Any]], gpu: Gpu) -> str:
    """A line for each kind of kernel, the most expensive first."""
    lines = []
    for kernel in sorted(kernels, key=lambda kernel: -kernel["count"] * kernel_us(kernel, gpu)):
        us, count = kernel_us(kernel, gpu), kernel["count"]
        lines.append(
            f"{count:4} x {us:7.1f} us = {count * us:7.1f} us  {kernel['bytes'] / 1e6:8.1f} MB "
            f"{kernel['flops'] / 1e9:7.1f} GFLOP  {kernel['phase']:10}  [{kernel['category']}] {kernel['name']}"
        )
    return "\n".join(lines)
