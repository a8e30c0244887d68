"""The launch plan, with the byte and operation counts that follow, and the table of tiles."""

import heapq
import itertools

import pytest
import torch

from fastirt.kernels import plan as module
from fastirt.kernels.passes import launch
from fastirt.kernels.reference import PairOptions
from fastirt.kernels.variants.tile_table import ANY, TABLE, has_tiles, lookup


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(module, "machine", lambda device: (90, 132))
    module.plan.cache_clear()
    yield torch.device("cpu")
    module.plan.cache_clear()


def covered(tiles, splits, per_split):
    return splits == 0 or (splits - 1) * per_split < tiles <= splits * per_split


@pytest.mark.parametrize("kind", ["stats", "grad"])
@pytest.mark.parametrize(
    "rows, batch, memory", [(1, 1, 0), (64, 64, 59551), (64, 0, 1), (1000, 1000, 4097), (8192, 8192, 59551), (3, 0, 0)]
)
def test_every_column_is_taken_once_and_no_program_is_idle(h200, kind, rows, batch, memory):
    p = module.plan(kind, "bf16", "bf16", rows, batch, memory, 384, h200)
    assert p.row_tiles * p.tile.bm >= rows and p.chunks * p.bd >= 384
    assert covered(-(-batch // p.tile.bn), p.batch_splits, p.batch_tiles)
    assert covered(-(-memory // p.tile.bn), p.memory_splits, p.memory_tiles)


def test_the_paper_s_batch_fills_the_machine_and_reads_the_memory_once_a_pass(h200):
    """N = 64, M = 59,551, D = 384, bf16: 45.7 MB a pass, 21 us for two at the 4.3 TB/s of an
    H200.
    """
    passes = [module.plan(kind, "bf16", "bf16", 64, 64, 59551, 384, h200) for kind in ("stats", "grad")]
    for p in passes:
        assert p.passes() == 1 and 116 <= p.splits <= 133
    forward, backward = (p.bytes_from_memory(59551 + 64, 2, 2) for p in passes)
    memory = 59551 * (384 * 2 + 8)
    assert memory < forward < 1.02 * memory
    # the partial gradients of 117 programs, written and read, mostly in L2
    assert memory < backward < 1.6 * memory
    assert sum(p.flops(59615) for p in passes) == 3 * 2 * 64 * 59615 * 384


@pytest.mark.parametrize("rows", [64, 512, 1024, 4096, 8192, 12800, 17000, 60000])
def test_the_programs_keep_the_machine_busy(h200, rows):
    """Programs in order, each to the multiprocessor that is free first."""
    for kind in ("stats", "grad"):
        p = module.plan(kind, "bf16", "bf16", rows, rows, 59551, 384, h200)
        work = [cols - i * per for cols, splits, per in (
            (-(-rows // p.tile.bn), p.batch_splits, p.batch_tiles),
            (-(-59551 // p.tile.bn), p.memory_splits, p.memory_tiles),
        ) for i in range(splits)]  # fmt: skip
        work = [
            min(left, per)
            for left, per in zip(work, [p.batch_tiles] * p.batch_splits + [p.memory_tiles] * p.memory_splits)
        ]
        free = [0] * 132
        for tiles in work:
            for _ in range(p.row_tiles * p.slices):
                heapq.heappush(free, heapq.heappop(free) + tiles)
        assert sum(work) * p.row_tiles * p.slices / 132 > 0.75 * max(free)


def test_nothing_grows_with_rows_times_slots(h200):
    """Scratch is bounded by the programs in flight, 132 tiles of rows, and by a few numbers a row
    and dimension.
    """
    for rows in (64, 1024, 8192):
        for slots in (6000, 59551, 10_000_000):
            stats, grad = (
                module.plan(kind, "bf16", "bf16", rows, rows, slots, 384, h200) for kind in ("stats", "grad")
            )
            assert stats.scratch_bytes <= 24 * (133 * stats.tile.bm + 9 * rows)
            assert grad.scratch_bytes <= 4 * 384 * (133 * grad.tile.bm + 9 * rows)


def test_the_table_has_tiles_for_every_gpu_precision_and_size():
    for arch in (0, 80, 90, 100, 103):
        for precision, columns in itertools.product(("bf16", "tf32", "fp32"), ("bf16", "fp16", "fp32")):
            for dim in (1, 64, 384, 385, 1024):
                for rows in (1, 256, 257, 10**6):
                    for kind in ("stats", "grad"):
                        tile = lookup(kind, arch, precision, columns, dim, rows)
                        assert min(tile.bm, tile.bn, tile.bd) >= 16 and (kind == "stats" or tile.grad_chunks >= 1)
    # too little shared memory: they take the reference
    assert not any(has_tiles(arch) for arch in (75, 86, 89, 120))
    with pytest.raises(ValueError, match="no tile for stats, compute capability 8.6"):
        lookup("stats", 86, "bf16", "bf16", 384, 64)
    assert all(row.tile.source for row in TABLE) and all(row.dim <= ANY for row in TABLE)


@pytest.mark.parametrize("arch, ahead", [(0, True), (80, True), (90, True), (100, False), (103, False)])
def test_loads_run_ahead_of_labels_where_that_helps(arch, ahead, monkeypatch):
    monkeypatch.setattr(launch, "machine", lambda device: (arch, 6))
    cpu = torch.device("cpu")
    assert launch._loads_ahead(PairOptions(finite_slots=True), cpu) == ahead
    assert not launch._loads_ahead(PairOptions(), cpu)
