"""What `fastirt.kernels.count_similarities` should take on an H200: a model, not a measurement.

    python -m benchmarks.predict.counts [QUERIES GALLERY DIM THRESHOLDS]    default: SOP, ViT-S

A program multiplies a tile, then compares it, so that these two times add up. Loads run ahead of
both, so that only the longer of the two counts. Not priced: the start of each program, the wait of
each product for the one before it, a last round with idle multiprocessors. Standard library only.
"""

from __future__ import annotations

import sys

from benchmarks.predict.categories import PRODUCTS
from benchmarks.predict.model import GPUS

SIZES = (60502, 60502, 384, 11)
TILE, SLICE, PARTS, MOST_THRESHOLDS = 128, 32, 3, 12  # of the kernel; products of float16 parts
PROCESSORS = 132
CLOCK = 1.5e9  # Hz under a load of tensor cores; the data sheet's rates are those of 1.83. Assumed.
# Of one multiprocessor in a clock: CUDA programming guide, throughput of arithmetic instructions.
COMPARISONS, ADDITIONS = 64, 128
# L2 of an H100, in bytes/s, as published by chipsandcheese.com (2023). Assumed for an H200.
L2_RATE = 5.5e12


def milliseconds(queries: int, gallery: int, dim: int, thresholds: int) -> dict[str, float]:
    """Parts of the time and their `total`, for all pairs of queries and gallery rows."""
    gpu = GPUS["H200"]
    rows, columns = (-(-count // TILE) * TILE for count in (queries, gallery))
    dim = -(-dim // SLICE) * SLICE
    passes = -(-thresholds // MOST_THRESHOLDS)
    each = -(-thresholds // passes // 4) * 4
    pairs = rows * columns * passes
    us = {
        "products": PARTS * 2 * pairs * dim / gpu.flops_per_us(PRODUCTS),
        # Of each pair and threshold: two comparisons, an addition, and a multiplication with one.
        "comparisons": pairs * each * (2 / COMPARISONS + 2 / ADDITIONS) / (PROCESSORS * CLOCK) * 1e6,
        # Two operands of four bytes a number for each tile.
        "loads from L2": pairs / TILE**2 * 2 * TILE * dim * 4 / L2_RATE * 1e6,
        # The float32 vectors are read four times and written twice, the parts written twice.
        "operands": 8 * (rows + columns) * dim * 4 / gpu.bytes_per_us,
    }
    us["total"] = max(us["products"] + us["comparisons"], us["loads from L2"]) + us["operands"]
    return {name: value / 1e3 for name, value in us.items()}


if __name__ == "__main__":
    for name, value in milliseconds(*(tuple(map(int, sys.argv[1:])) or SIZES)).items():
        print(f"{name:15} {value:6.1f} ms")
