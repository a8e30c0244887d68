"""What `fastirt.kernels.aot` compiles: kernels, constants and types as `launch` gives them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, Optional

from fastirt.kernels import gather
from fastirt.kernels.counts.kernel import MOST_THRESHOLDS, SLICE, count_kernel
from fastirt.kernels.counts.similarities import TILES
from fastirt.kernels.passes import backward, forward, losses
from fastirt.kernels.plan import LOADS_AHEAD, cdiv, chunk
from fastirt.kernels.variants.tile_table import Tile, lookup, product_dtype

ARCHS = (80, 90, 100)
PRECISIONS = ("bf16", "tf32", "fp32")
COLUMNS = ("bf16", "fp32")  # --memory-dtype
DIMS = (192, 384, 768, 1024)  # ViT-Ti, S, B and L
ROWS = (64, 1024)  # one of each side of the table's limit


@dataclass(frozen=True)
class Use:
    """The flags of one call of `stats_kernel` and `grad_kernel`; see `sharded.py`."""

    batch: bool
    memory: bool
    self_index: bool
    pairs: bool = True

    @property
    def name(self) -> str:
        parts = [("batch", self.batch), ("memory", self.memory), ("own", self.self_index), ("nearest", not self.pairs)]
        return "+".join(name for name, present in parts if present)


WHOLE = Use(True, True, True)  # contrastive_koleo as in training
MEMORY = Use(False, True, True)  # pair_stats and pair_grad of the memory
USES = {
    "stats": (
        WHOLE,
        Use(True, True, False),  # a momentum encoder: no row is its own slot
        Use(True, False, False),  # without a memory
        MEMORY,
        Use(False, True, False),
        Use(True, False, False, pairs=False),  # nearest
    ),
    "grad": (WHOLE, Use(True, True, False), Use(True, False, False), MEMORY, Use(False, True, False)),
}


@dataclass(frozen=True)
class Job:
    """One kernel with one set of constants for one target."""

    kernel: str
    arch: int
    precision: str
    dim: int
    tile: Optional[Tile] = None
    nonzero: bool = True
    columns: str = "fp32"  # dtype of the memory
    use: Use = WHOLE
    finite_slots: bool = True

    @property
    def name(self) -> str:
        t = self.tile
        if t is None:
            return f"{self.kernel} sm_{self.arch} {self.precision} D={self.dim}"
        tile = f"{t.bm}x{t.bn}x{t.bd} warps={t.warps} stages={t.stages}"
        if not self.is_objective:
            return f"{self.kernel} sm_{self.arch} {self.precision} D={self.dim} {tile}"
        tile += f" out={t.grad_chunks} skip={int(t.skip_inactive)}"
        reduction = "nonzero_mean" if self.nonzero else "anchor_sum"
        head = f"{self.kernel} sm_{self.arch} {self.precision} D={self.dim} columns={self.columns}"
        return f"{head} {tile} {reduction} {self.use.name}{' any slots' if self.waits_for_labels else ''}"

    @property
    def is_objective(self) -> bool:
        """Whether the flags of the losses apply: `nonzero`, `columns`, `use`, `finite_slots`."""
        return self.kernel in USES

    @property
    def waits_for_labels(self) -> bool:
        """Whether labels decide what to load, although training's kernel does not wait for them."""
        return not self.finite_slots and self.arch in LOADS_AHEAD

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * (self.tile.warps if self.tile else gather.WARPS if "gather" in self.kernel else 4)


def jobs(archs: tuple[int, ...] = ARCHS, every: bool = False) -> list[Job]:
    """What the command line can reach: precision x dtype of the memory x D x reduction x flags.

    Rows come in the dtype of the products. every: all combinations. Otherwise each tile of each
    precision and dtype once, and each use once for each kernel and GPU; reductions take turns.
    Calls of others, whose empty slots may hold anything, come once for each kernel and GPU.
    """
    todo = []
    for arch in archs:
        for kind in ("stats", "grad"):
            for precision, columns in itertools.product(PRECISIONS, COLUMNS):
                full = itertools.product(DIMS, ROWS, (True, False), USES[kind])
                todo += [
                    _pairs_job(kind, arch, precision, columns, *rest)
                    for rest in (full if every else _each_tile(kind, arch, precision, columns))
                ]
            todo += [] if every else _each_use(kind, arch)
            if arch in LOADS_AHEAD:
                todo += [replace(_pairs_job(kind, arch, "tf32", "fp32", 384, ROWS[0], True, WHOLE), finite_slots=False)]
        todo += [Job(name, arch, "fp32", 384) for name in ("rows", "totals", "combine", "combine few")]
        todo += [Job(name, arch, "bf16", 224) for name in ("gather", "gather edges")]
        widths = (4, 8, MOST_THRESHOLDS) if every else (MOST_THRESHOLDS,)
        todo += [Job(f"count {thresholds}", arch, "fp16", 384, TILES[arch]) for thresholds in widths]
    return list(dict.fromkeys(todo))


def _pairs_job(kind: str, arch: int, precision: str, columns: str, dim: int, rows: int, nonzero: bool, use: Use) -> Job:
    dtype = columns if use.memory else product_dtype(precision)
    tile = lookup(kind, arch, precision, dtype, dim, rows)
    return Job(kind, arch, precision, dim, tile, nonzero, dtype, use, arch in LOADS_AHEAD)


def _each_tile(kind: str, arch: int, precision: str, columns: str) -> Iterator[tuple[int, int, bool, Use]]:
    """(D, rows, nonzero, use) of each tile at the first of its D.

    fp32 products, which take longest to compile, have the same tiles for both dtypes: with a bf16
    memory only D = 384, and batch and memory together only with an fp32 one at D = 384.
    """
    found: dict[Tile, tuple[int, int]] = {}
    dims = (384,) if (precision, columns) == ("fp32", "bf16") else (384, 1024, 192, 768)
    for dim, rows in itertools.product(dims, ROWS):
        found.setdefault(lookup(kind, arch, precision, columns, dim, rows), (dim, rows))
    for turn, (dim, rows) in enumerate(found.values()):
        nonzero = bool((turn + COLUMNS.index(columns)) % 2)
        yield dim, rows, nonzero, WHOLE if precision != "fp32" or dim == 384 and columns == "fp32" else MEMORY


def _each_use(kind: str, arch: int) -> Iterator[Job]:
    """Each use besides `WHOLE` at D = 384, with bf16 and tf32 products and both dtypes in turn."""
    for number, use in enumerate(USES[kind][1:]):
        precision, columns = PRECISIONS[number % 2], COLUMNS[number // 2 % 2]
        yield _pairs_job(kind, arch, precision, columns, 384, ROWS[0], bool(number % 2), use)


def source(job: Job) -> tuple[Any, Callable[[str], str], dict[str, Any], dict[str, int]]:
    """(kernel, type of an argument by name, constants, options)."""
    tile = job.tile
    has = {"HAS_BATCH": True, "HAS_MEMORY": True}
    if job.kernel in ("stats", "grad"):
        bd = chunk(tile, job.dim)
        constants = dict(
            D=job.dim, BM=tile.bm, BN=tile.bn, BD=bd, CHUNKS=cdiv(job.dim, bd), NONZERO=job.nonzero,
            HAS_SELF_INDEX=job.use.self_index, PRECISION=job.precision,
            HAS_BATCH=job.use.batch, HAS_MEMORY=job.use.memory, FINITE_SLOTS=job.finite_slots,
        )  # fmt: skip
        if job.kernel == "stats":
            constants["PAIRS"] = job.use.pairs
        else:
            slices = cdiv(constants["CHUNKS"], tile.grad_chunks)
            constants.update(GRAD_CHUNKS=cdiv(constants["CHUNKS"], slices), SKIP_INACTIVE=tile.skip_inactive)
        kernel = forward.stats_kernel if job.kernel == "stats" else backward.grad_kernel
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
    elif job.kernel.startswith("count"):
        kernel, options = count_kernel, {"num_warps": tile.warps, "num_stages": tile.stages}
        constants = dict(D=job.dim, BM=tile.bm, BN=tile.bn, BD=SLICE, SLICES=cdiv(job.dim, SLICE))
        constants["RB"] = int(job.kernel.split()[1])
    elif job.kernel == "rows":
        kernel, options = losses.rows_kernel, {}
        constants = dict(D=job.dim, BD=128, BR=8, BS=32, PAIRS=True, **has)
    elif job.kernel == "totals":
        kernel, options = losses.totals_kernel, {}
        constants = dict(NONZERO=True, BT=256, **has)
    elif job.kernel in ("gather", "gather edges"):
        kernel, options = gather.gather_kernel, {"num_warps": gather.WARPS}
        constants = dict(S=job.dim, GROUPS=gather.GROUPS, EDGES=job.kernel == "gather edges")
    else:
        kernel, options = backward.combine_kernel, {}
        rows, splits = (1, 16) if job.kernel == "combine few" else (8, 4)
        constants = dict(D=job.dim, BR=rows, BD=128, BI=128, BS=splits, HAS_KOLEO=True)
    products = product_dtype(job.precision) if tile else "fp32"

    def types(name: str) -> str:
        if kernel is gather.gather_kernel:
            return {"out_ptr": "*i16", "table_ptr": "*i16", "pixels_ptr": "*u8", "length": "i64"}.get(name, "*i64")
        if kernel is count_kernel and name in ("query_ptr", "gallery_ptr"):
            return "*fp16"
        if name in ("above_ptr", "within_ptr"):
            return "*i32"
        if name == "memory_ptr":
            return f"*{job.columns}"
        if name in ("rows_ptr", "cols_ptr"):
            return f"*{products}"
        if name in ("tile_sums_ptr",) or (name == "sums_ptr" and job.kernel == "totals"):
            return "*fp64"
        if name == "counts_ptr":
            return "*i64" if job.kernel == "totals" else "*i32"
        if name in ("best_col_ptr",):
            return "*i32"
        if "labels" in name or name in ("self_index_ptr", "index_ptr", "tile_counts_ptr"):
            return "*i64"
        if name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name in ("margin", "koleo_eps", "distance_eps") else "i32"

    return kernel, types, constants, options
