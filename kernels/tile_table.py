"""Tile sizes by kernel, GPU, precision, D and N: the first row that fits is taken.

Each row states its source: the GPU on which it was measured, or `aot`, the tile with the most rows
that the compiler fits without spilling, which nobody has timed. `python -m fastirt.kernels.tune`
prints rows of this form.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    precision: str  # of the products; mixed: bf16 products of vectors of another dtype
    dim: int  # largest D
    rows: int  # largest N
    tile: Tile


ANY = 1 << 40
A100, HOPPER, BLACKWELL = (80,), (90,), (100, 103)
TABLE = [
    # Three stages, where shared memory has room, load one tile ahead while another is computed.
    # bf16: mma.sync, wgmma and tcgen05. Up to 256 rows, memory bandwidth is the limit, and a tile
    # of 64 rows reads the columns once. For more rows, taller tiles read them less often from L2,
    # and the backward skips tiles without an active pair.
    TileRow("stats", A100, "bf16", 384, 256, Tile(64, 64, 128, 4, 3)),
    TileRow("stats", HOPPER, "bf16", 384, 256, Tile(64, 64, 128, 4, 3)),
    TileRow("stats", BLACKWELL, "bf16", 384, ANY, Tile(64, 64, 128, 8, 2)),
    TileRow("stats", A100, "bf16", 384, ANY, Tile(128, 64, 64, 8, 2)),
    TileRow("stats", HOPPER, "bf16", 384, ANY, Tile(128, 64, 64, 8, 2)),
    TileRow("stats", A100 + HOPPER + BLACKWELL, "bf16", 1024, ANY, Tile(64, 16, 128, 4, 2)),
    TileRow("grad", HOPPER, "bf16", 384, 256, Tile(64, 64, 128, 8, 3, grad_chunks=3)),
    TileRow("grad", HOPPER, "bf16", 384, ANY, Tile(64, 32, 128, 8, 3, grad_chunks=3, skip_inactive=True)),
    TileRow("grad", A100, "bf16", 384, ANY, Tile(64, 64, 128, 8, 3, grad_chunks=3)),
    TileRow("grad", BLACKWELL, "bf16", 384, ANY, Tile(64, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "bf16", 1024, ANY, Tile(64, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100, "bf16", 768, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=3, skip_inactive=True)),
    TileRow("grad", A100 + BLACKWELL, "bf16", 1024, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=4)),
    # bf16 products of float32 vectors: tiles hold both dtypes.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "mixed", 384, ANY, Tile(64, 32, 128, 4, 2)),
    TileRow("stats", HOPPER, "mixed", 1024, ANY, Tile(64, 16, 128, 4, 2)),
    TileRow("stats", A100 + BLACKWELL, "mixed", 1024, ANY, Tile(32, 16, 64, 4, 2)),
    TileRow("grad", A100 + BLACKWELL, "mixed", 384, ANY, Tile(64, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "mixed", 384, ANY, Tile(64, 16, 64, 8, 3, grad_chunks=6)),
    TileRow("grad", A100, "mixed", 768, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "mixed", 1024, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=8)),
    # tf32: also for float16 vectors.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "tf32", 384, ANY, Tile(64, 32, 128, 4, 2)),
    TileRow("stats", HOPPER + BLACKWELL, "tf32", 1024, ANY, Tile(32, 16, 64, 4, 2)),
    TileRow("stats", A100, "tf32", 1024, ANY, Tile(16, 16, 64, 4, 2)),
    TileRow("grad", A100, "tf32", 384, ANY, Tile(64, 32, 128, 8, 3, grad_chunks=3)),
    TileRow("grad", HOPPER, "tf32", 384, ANY, Tile(32, 32, 128, 8, 3, grad_chunks=3)),
    TileRow("grad", BLACKWELL, "tf32", 384, ANY, Tile(64, 16, 64, 8, 2, grad_chunks=6)),
    TileRow("grad", HOPPER + BLACKWELL, "tf32", 1024, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100, "tf32", 1024, ANY, Tile(16, 16, 64, 4, 2, grad_chunks=8)),
    # fp32: without matrix instructions.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "fp32", 384, ANY, Tile(32, 32, 64, 8, 2)),
    TileRow("stats", A100 + HOPPER + BLACKWELL, "fp32", 1024, ANY, Tile(16, 16, 64, 8, 1)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "fp32", 384, ANY, Tile(32, 32, 64, 8, 2, grad_chunks=3)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "fp32", 1024, ANY, Tile(16, 16, 64, 8, 1, grad_chunks=4)),
    # The interpreter: large tiles, because every program is slow.
    TileRow("stats", (0,), "any", ANY, ANY, Tile(128, 256, 256, 4, 1, source="interpreter")),
    TileRow(
        "grad",
        (0,),
        "any",
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


def lookup(kind: str, arch: int, precision: str, dim: int, rows: int) -> Tile:
    """The tile of the first row that fits. Raises ValueError if none does."""
    for row in TABLE:
        fits = row.kind == kind and arch in row.arch and row.precision in ("any", precision)
        if fits and dim <= row.dim and rows <= row.rows:
            return row.tile
    raise ValueError(f"no tile for {kind}, compute capability {arch / 10}, {precision}, D = {dim}")
