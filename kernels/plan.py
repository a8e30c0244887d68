"""What a call launches: tile sizes, columns for each program, bytes and operations."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Optional

import torch

from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.variants.tile_table import Tile, lookup

# Compute capabilities where loads that do not depend on labels help. On 10.0 the same loop has a
# fifth more instructions and waits for all copies between its products.
LOADS_AHEAD = (0, 80, 90)
INTERPRETER_PROGRAMS = 6  # enough to have several splits, few enough to be quick


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def chunk(tile: Tile, dim: int) -> int:
    """Numbers of D in one operand: tile.bd, or less for a small D; a power of two, at least 16."""
    return min(tile.bd, max(16, 1 << (dim - 1).bit_length()))


@dataclass(frozen=True)
class Plan:
    """One pass: `batch_splits` splits of `batch_tiles` column tiles; likewise for the memory."""

    kind: str
    tile: Tile
    rows: int
    dim: int
    row_tiles: int
    batch_splits: int
    batch_tiles: int
    memory_splits: int
    memory_tiles: int
    slices: int  # of D, in the backward; each recomputes the similarities

    @property
    def splits(self) -> int:
        return self.batch_splits + self.memory_splits

    @property
    def bd(self) -> int:
        return chunk(self.tile, self.dim)

    @property
    def chunks(self) -> int:
        return cdiv(self.dim, self.bd)

    @property
    def grad_chunks(self) -> int:
        return cdiv(self.chunks, self.slices)

    def passes(self) -> int:
        """How often the columns are read: once for each tile of rows and slice of D."""
        return self.row_tiles * self.slices

    def bytes_from_memory(self, columns: int, column_bytes: int, row_bytes: int) -> int:
        """Bytes that this pass moves at least, if every column is read once.

        They are the columns and rows with int64 labels, and scratch, which is written and read
        again.
        """
        vectors = columns * (self.dim * column_bytes + 8) + self.rows * (self.dim * row_bytes + 8)
        return vectors + 2 * self.scratch_bytes

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the programs leave for the next kernel.

        In the forward 16 bytes of sums and counts for each split and row, and 8 of the nearest
        column for each split of the batch; in the backward a partial gradient for each split.
        """
        if self.kind == "grad":
            return self.splits * self.rows * self.dim * 4
        return self.splits * self.rows * 16 + self.batch_splits * self.rows * 8

    def flops(self, columns: int) -> int:
        """Operations of the products: similarities in each slice, gradients in the backward."""
        similarities = 2 * self.rows * columns * self.dim * self.slices
        return similarities + (2 * self.rows * columns * self.dim if self.kind == "grad" else 0)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages}


@functools.lru_cache(maxsize=1024)
def plan(
    kind: str,
    precision: str,
    columns: str,
    rows: int,
    batch: int,
    memory: int,
    dim: int,
    device: torch.device,
    tile: Optional[Tile] = None,
) -> Plan:
    """The plan of one pass; splits are in proportion to the columns.

    kind: "stats" (forward) or "grad" (backward).
    precision: of the products. columns: dtype of the memory, as in `TileRow`.
    rows, batch, memory: N, C and M; C and M may be 0.
    dim: D.
    tile: by default the tile of the table.
    """
    arch, processors = machine(device)
    tile = tile or lookup(kind, arch, precision, columns, dim, rows)
    row_tiles = max(1, cdiv(rows, tile.bm))
    batch_cols, memory_cols = cdiv(batch, tile.bn), cdiv(memory, tile.bn)
    slices = 1
    if kind == "grad":
        slices = cdiv(cdiv(dim, chunk(tile, dim)), tile.grad_chunks)
    per_program = _tiles_per_program(batch_cols, memory_cols, row_tiles * slices, tile.waves * processors)
    batch_splits, memory_splits = cdiv(batch_cols, per_program), cdiv(memory_cols, per_program)
    return Plan(
        kind, tile, rows, dim, row_tiles,
        batch_splits, cdiv(batch_cols, max(1, batch_splits)),
        memory_splits, cdiv(memory_cols, max(1, memory_splits)),
        slices,
    )  # fmt: skip


def _tiles_per_program(batch: int, memory: int, rows: int, programs: int) -> int:
    """Column tiles for one program, chosen for the earliest end of the pass.

    Each of `rows` tiles of rows has `batch` + `memory` column tiles, and `programs` run at once. If
    there are more, some start late, which on average leaves the GPU idle for half a program's time.
    With more than one round there are at most five splits, since each costs scratch, and with four
    rounds or more only one.
    """

    def time(tiles: int) -> float:
        if rows * (cdiv(batch, tiles) + cdiv(memory, tiles)) <= programs:
            return tiles
        return rows * (batch + memory) / programs + tiles / 2

    most = max(5, programs // rows) if rows < 4 * programs else 1
    splits = range(1, most + 1)
    return min((max(1, cdiv(batch + memory, n)) for n in splits), key=time)


@torch.compiler.assume_constant_result
def machine(device: torch.device) -> tuple[int, int]:
    """(compute capability as 80, 90, 100; multiprocessors); under the interpreter (0, 6)."""
    return _machine(device)


@functools.cache
def _machine(device: torch.device) -> tuple[int, int]:
    if INTERPRETED or device.type != "cuda":
        return 0, INTERPRETER_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count
