"""Tile sizes, the first row that fits. Every row says where it comes from: `aot` (no spill, most rows per tile that
fits; roofline, not a clock) or the GPU that it was measured on. `python -m fastirt.kernels.tune` prints rows in this form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """bm x bn similarities at a time, operands of bd columns of D; a backward program keeps `out` chunks of gradient."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int
    out: int = 0
    skip: bool = True
    waves: int = 1
    source: str = "aot"


@dataclass(frozen=True)
class Row:
    kind: str  # stats, grad
    arch: tuple[int, ...]  # compute capabilities
    precision: str
    dim: int  # up to
    rows: int  # N up to
    tile: Tile


ANY = 1 << 40
TABLE = [
    Row("stats", (0,), "any", ANY, ANY, Tile(128, 256, 256, 4, 1, source="interpreter")),
    Row("grad", (0,), "any", ANY, ANY, Tile(128, 256, 256, 4, 1, out=2, source="interpreter")),
]


def lookup(kind: str, arch: int, precision: str, dim: int, rows: int) -> Tile:
    """The tile for a compute capability (0 = interpreter); an unknown one takes that of the nearest older one."""
    known = sorted({a for row in TABLE for a in row.arch if a <= arch})
    arch = known[-1] if arch and known and known[-1] else arch
    for row in TABLE:
        fits = row.kind == kind and arch in row.arch and row.precision in ("any", precision)
        if fits and dim <= row.dim and rows <= row.rows:
            return row.tile
    raise ValueError(f"no tile for {kind}, compute capability {arch / 10}, {precision}, D = {dim}: needs 8.0 or newer")
