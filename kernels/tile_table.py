"""Tile sizes, the first row that fits. Every row says where it comes from: `aot` (no spill, most rows per tile that
fits; roofline, not a clock) or the GPU that it was measured on. `python -m fastirt.kernels.tune` prints rows in this form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """bm x bn similarities at a time, operands of bd columns of D; a backward program keeps `grad_chunks` chunks of gradient."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int
    grad_chunks: int = 0
    skip_inactive: bool = False  # in the backward: whether tiles without an active pair are left out
    waves: int = 1
    source: str = "aot"


@dataclass(frozen=True)
class TileRow:
    kind: str  # stats, grad
    arch: tuple[int, ...]  # compute capabilities
    precision: str
    dim: int  # up to
    rows: int  # N up to
    tile: Tile


ANY = 1 << 40
A100, HOPPER, BLACKWELL = (80,), (90,), (100, 103)
TABLE = [
    # bf16: mma.sync, wgmma and tcgen05. Up to 256 rows the memory's bandwidth is the limit and a tile of 64 rows reads it
    # once; beyond, taller tiles read it less often from L2, and tiles without an active pair are skipped in the backward.
    TileRow("stats", A100, "bf16", 384, 256, Tile(64, 64, 128, 4, 2)),
    TileRow("stats", HOPPER, "bf16", 384, 256, Tile(64, 64, 128, 4, 2)),
    TileRow("stats", BLACKWELL, "bf16", 384, ANY, Tile(64, 64, 128, 8, 2)),
    TileRow("stats", A100, "bf16", 384, ANY, Tile(128, 64, 64, 8, 2)),
    TileRow("stats", HOPPER, "bf16", 384, ANY, Tile(128, 64, 64, 8, 3)),
    TileRow("stats", A100 + HOPPER + BLACKWELL, "bf16", 1024, ANY, Tile(64, 16, 128, 4, 2)),
    TileRow("grad", HOPPER, "bf16", 384, 256, Tile(64, 64, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "bf16", 384, ANY, Tile(64, 32, 128, 8, 3, grad_chunks=3, skip_inactive=True)),
    TileRow("grad", A100, "bf16", 384, ANY, Tile(64, 64, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", BLACKWELL, "bf16", 384, ANY, Tile(64, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "bf16", 1024, ANY, Tile(64, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100, "bf16", 768, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=3, skip_inactive=True)),
    TileRow("grad", A100 + BLACKWELL, "bf16", 1024, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=4)),
    # bf16 products of float32 vectors: tiles hold both.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "mixed", 384, ANY, Tile(64, 32, 128, 4, 2)),
    TileRow("stats", HOPPER, "mixed", 1024, ANY, Tile(64, 16, 128, 4, 2)),
    TileRow("stats", A100 + BLACKWELL, "mixed", 1024, ANY, Tile(32, 16, 64, 4, 2)),
    TileRow("grad", A100 + BLACKWELL, "mixed", 384, ANY, Tile(64, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "mixed", 384, ANY, Tile(64, 16, 64, 8, 2, grad_chunks=6)),
    TileRow("grad", A100, "mixed", 768, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "mixed", 1024, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=8)),
    # tf32: also what float16 vectors take.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "tf32", 384, ANY, Tile(64, 32, 128, 4, 2)),
    TileRow("stats", HOPPER + BLACKWELL, "tf32", 1024, ANY, Tile(32, 16, 64, 4, 2)),
    TileRow("stats", A100, "tf32", 1024, ANY, Tile(16, 16, 64, 4, 2)),
    TileRow("grad", A100, "tf32", 384, ANY, Tile(64, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", HOPPER, "tf32", 384, ANY, Tile(32, 32, 128, 8, 2, grad_chunks=3)),
    TileRow("grad", BLACKWELL, "tf32", 384, ANY, Tile(64, 16, 64, 8, 2, grad_chunks=6)),
    TileRow("grad", HOPPER + BLACKWELL, "tf32", 1024, ANY, Tile(32, 16, 64, 8, 2, grad_chunks=4)),
    TileRow("grad", A100, "tf32", 1024, ANY, Tile(16, 16, 64, 4, 2, grad_chunks=8)),
    # fp32: no matrix instruction has it.
    TileRow("stats", A100 + HOPPER + BLACKWELL, "fp32", 384, ANY, Tile(32, 32, 64, 8, 2)),
    TileRow("stats", A100 + HOPPER + BLACKWELL, "fp32", 1024, ANY, Tile(16, 16, 64, 8, 1)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "fp32", 384, ANY, Tile(32, 32, 64, 8, 2, grad_chunks=3)),
    TileRow("grad", A100 + HOPPER + BLACKWELL, "fp32", 1024, ANY, Tile(16, 16, 64, 8, 1, grad_chunks=4)),
    # The interpreter: whatever has few programs.
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
    """Whether the table has tiles for a compute capability (0 = interpreter). Others of a generation have less shared memory."""
    return any(arch in row.arch for row in TABLE)


def lookup(kind: str, arch: int, precision: str, dim: int, rows: int) -> Tile:
    """The first row of the table that fits. Raises ValueError where there is none."""
    for row in TABLE:
        fits = row.kind == kind and arch in row.arch and row.precision in ("any", precision)
        if fits and dim <= row.dim and rows <= row.rows:
            return row.tile
    raise ValueError(f"no tile for {kind}, compute capability {arch / 10}, {precision}, D = {dim}")
