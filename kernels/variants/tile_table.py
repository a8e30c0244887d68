"""Tile sizes by kernel, GPU, precision, D and N: the first row that fits is taken.

Each row states its source: the GPU on which it was measured, or `aot`, the tile with the most rows
that the compiler fits without spilling, which nobody has timed. `python -m fastirt.kernels.tune`
prints rows of this form.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Tile:
    """A tile is bm x bn similarities, computed from operands of bd numbers of D."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int
    grad_chunks: int = 0  # backward: most chunks of bd numbers of gradient that a program keeps
    skip_inactive: bool = False  # backward: whether to skip tiles without an active pair
    waves: int = 1  # programs planned for each multiprocessor
    source: str = "aot"


@dataclass(frozen=True)
class TileRow:
    kind: str  # stats, grad
    arch: tuple[int, ...]  # compute capabilities
    precision: str  # of the products; the rows come in its `product_dtype`
    columns: tuple[str, ...]  # dtypes of the columns
    dim: int  # largest D
    rows: int  # largest N
    tile: Tile


ANY = 1 << 40
BF16, NOT_BF16, ANY_DTYPE = ("bf16",), ("fp32", "fp16"), ("bf16", "fp16", "fp32")
SIXTEEN_BITS, FP32 = ("bf16", "fp16"), ("fp32",)
# Triton 3.6 spills 160 bytes with the first, 3.7 none.
_FEW_ROWS = Tile(64, 64, 128, 8, 3, grad_chunks=3)
_FEW_ROWS_36 = Tile(64, 32, 128, 8, 2, grad_chunks=3)
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_A100_STAGES = 3 if _TRITON >= (3, 7) else 2  # 3.6 spills 120 bytes with three
A100, HOPPER, BLACKWELL = (80,), (90,), (100, 103)
TABLE = [
    # Three stages, where shared memory has room, load one tile ahead while another is computed.
    # bf16: mma.sync, wgmma and tcgen05. Up to 256 rows, memory bandwidth is the limit, and a tile
    # of 64 rows reads the columns once. For more rows, taller tiles read them less often from L2,
    # and the backward skips tiles without an active pair.
    TileRow("stats", A100, "bf16", BF16, 384, 256, Tile(64, 64, 128, 4, 3)),
    TileRow("stats", HOPPER, "bf16", BF16, 384, 256, Tile(64, 64, 128, 4, 3)),
    TileRow("stats", BLACKWELL, "bf16", BF16, 384, ANY, Tile(64, 64, 128, 8, 2)),
    TileRow("stats", A100, "bf16", BF16, 384, ANY, Tile(128, 64, 64, 8, 2)),
    TileRow("stats", HOPPER, "bf16", BF16, 384, ANY, Tile(128, 64, 64, 8, 2)),
    TileRow("stats", A100, "bf16", BF16, 1024, ANY, Tile(64, 16, 64, 4, 2)),
    TileRow("stats", HOPPER + BLACKWELL, "bf16", BF16, 1024, ANY, Tile(64, 16, 128, 4, 2)),
    TileRow("grad", HOPPER, "bf16", BF16, 384, 256, _FEW_ROWS if _TRITON >= (3, 7) else _FEW_ROWS_36),
    TileRow("grad", HOPPER, "bf16", BF16, 384, ANY, Tile(64, 32, 128, 8, 3, grad_chunks=3, skip_inactive=True)),
    TileRow("grad", A100, "bf16", BF16, 384, ANY, Tile(64, 64, 128, 8, 3, grad_chunks=3)),
    TileRow("grad", BLACKWELL, "bf16", BF16, 384, ANY, Tile(64, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "bf16", BF16, 1024, ANY, Tile(64, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100, "bf16", BF16, 768, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=3, skip_inactive=True)),
    TileRow("grad", A100 + BLACKWELL, "bf16", BF16, 1024, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=4)),
    # bf16 products of columns of another dtype, which are cast in registers.
    TileRow("stats", A100 + HOPPER, "bf16", NOT_BF16, 384, ANY, Tile(64, 32, 128, 4, 2)),
    TileRow("stats", BLACKWELL, "bf16", NOT_BF16, 384, ANY, Tile(64, 32, 128, 8, 2)),
    TileRow("stats", HOPPER, "bf16", NOT_BF16, 1024, ANY, Tile(64, 16, 128, 8, 2)),
    TileRow("stats", A100 + BLACKWELL, "bf16", NOT_BF16, 1024, ANY, Tile(32, 16, 64, 4, 2)),
    TileRow("grad", A100 + BLACKWELL, "bf16", NOT_BF16, 384, ANY, Tile(64, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "bf16", NOT_BF16, 384, ANY, Tile(64, 16, 64, 8, 3, grad_chunks=6)),
    TileRow("grad", A100, "bf16", NOT_BF16, 768, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "bf16", NOT_BF16, 1024, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=8)),
    # tf32: columns of 16 bits are cast in registers.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "tf32", ANY_DTYPE, 384, ANY, Tile(64, 32, 128, 4, 2)),
    TileRow("stats", HOPPER + BLACKWELL, "tf32", ANY_DTYPE, 1024, ANY, Tile(32, 16, 256, 4, 2)),
    TileRow("stats", A100, "tf32", ANY_DTYPE, 1024, ANY, Tile(16, 16, 64, 4, 2)),
    TileRow("grad", A100, "tf32", FP32, 384, ANY, Tile(64, 32, 128, 8, _A100_STAGES, grad_chunks=3)),
    TileRow("grad", A100, "tf32", SIXTEEN_BITS, 384, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "tf32", ANY_DTYPE, 192, ANY, Tile(32, 32, 64, 4, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "tf32", ANY_DTYPE, 384, ANY, Tile(32, 32, 128, 8, 3, grad_chunks=3)),
    TileRow("grad", BLACKWELL, "tf32", ANY_DTYPE, 384, ANY, Tile(64, 16, 64, 8, 2, grad_chunks=6)),
    TileRow("grad", HOPPER + BLACKWELL, "tf32", ANY_DTYPE, 1024, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100, "tf32", ANY_DTYPE, 1024, ANY, Tile(16, 16, 64, 4, 2, grad_chunks=8)),
    # fp32: without matrix instructions.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "fp32", ANY_DTYPE, 384, ANY, Tile(32, 32, 64, 8, 2)),
    TileRow("stats", A100 + HOPPER + BLACKWELL, "fp32", ANY_DTYPE, 1024, ANY, Tile(16, 16, 64, 8, 1)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "fp32", ANY_DTYPE, 384, ANY, Tile(32, 32, 64, 8, 2, grad_chunks=3)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "fp32", ANY_DTYPE, 1024, ANY, Tile(16, 16, 64, 8, 1, grad_chunks=4)),
    # The interpreter: large tiles, because every program is slow.
    TileRow("stats", (0,), "any", ANY_DTYPE, ANY, ANY, Tile(128, 256, 256, 4, 1, source="interpreter")),
    TileRow(
        "grad",
        (0,),
        "any",
        ANY_DTYPE,
        ANY,
        ANY,
        Tile(128, 256, 256, 4, 1, grad_chunks=2, skip_inactive=True, source="interpreter"),
    ),
]


def has_tiles(arch: int) -> bool:
    """Whether the table has tiles for a compute capability (0 = interpreter).

    Other GPUs of these generations, such as 8.6, have too little shared memory for them.
    """
    return any(arch in row.arch for row in TABLE)


def product_dtype(precision: str) -> str:
    """Dtype of both factors of a product, in which rows and the batch's columns are given."""
    return "bf16" if precision == "bf16" else "fp32"


def lookup(kind: str, arch: int, precision: str, columns: str, dim: int, rows: int) -> Tile:
    """The tile of the first row that fits; columns: their dtype. Raises ValueError if none does."""
    for row in TABLE:
        fits = row.kind == kind and arch in row.arch and row.precision in ("any", precision) and columns in row.columns
        if fits and dim <= row.dim and rows <= row.rows:
            return row.tile
    raise ValueError(
        f"no tile for {kind}, compute capability {arch / 10}, {precision} products with {columns} columns, D = {dim}"
    )
