"""Launches the kernels over a plan: five launches for forward and backward of all three losses."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from fastirt.kernels.passes.backward import combine_kernel, grad_kernel
from fastirt.kernels.passes.forward import stats_kernel
from fastirt.kernels.passes.losses import rows_kernel, totals_kernel
from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.plan import LOADS_AHEAD, Plan, cdiv, machine, plan
from fastirt.kernels.reference import PairOptions
from fastirt.kernels.variants.tile_table import Tile, product_dtype

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Columns(NamedTuple):
    """Vectors (C, D), labels (C,), and the column that is row i itself.

    In the memory that is self_index[i] (N,) int64, -1 or None: none; in the batch i + row_offset.
    products: of the batch, the vectors in the dtype of the products (see `product_operand`), which
        take these; KoLeo takes `vectors`. None: `vectors` are in that dtype. The memory keeps its
        dtype, because a copy of it would cost as much as the pass; its tiles are cast.
    """

    vectors: Tensor
    labels: Tensor
    self_index: Optional[Tensor] = None
    row_offset: int = 0
    products: Optional[Tensor] = None

    @property
    def operand(self) -> Tensor:
        return self.vectors if self.products is None else self.products


class Forward(NamedTuple):
    batch: Tensor  # 0-d float32
    memory: Tensor  # 0-d float32
    koleo: Tensor  # 0-d float32
    scales: Tensor  # (5,) float32: weights of pairs (batch +, -, memory +, -), KoLeo's 1/N
    rho: Tensor  # (N,) float32
    index: Tensor  # (N,) int64, -1 = none
    sums: Tensor  # (5,) float64: batch +, batch -, memory +, memory -, log(rho + eps)
    counts: Tensor  # (5,) int64: the four pair counts, rows


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make the first argument's GPU current during the call: Triton launches there."""

    @functools.wraps(function)
    def guarded(rows: Tensor, *args: Any, **options: Any) -> Any:
        with torch.cuda.device(rows.device) if rows.is_cuda else contextlib.nullcontext():
            return function(rows, *args, **options)

    return guarded


@on_its_device
def forward(
    rows: Tensor,
    row_labels: Tensor,
    batch: Optional[Columns],
    memory: Optional[Columns],
    options: PairOptions,
    *,
    products: Optional[Tensor] = None,
    pairs: bool = True,
    tile: Optional[Tile] = None,
) -> Forward:
    """Three launches; without `pairs` two, which write rho and index only.

    All tensors are on one device and valid, options.precision is resolved. products: the rows as
    in `Columns`. tile: None = the table's.
    """
    products = rows if products is None else products
    count, dim = rows.shape
    device = rows.device
    p = _plan("stats", products, batch, memory, options, tile)
    sums = torch.empty(p.splits, 2, count, dtype=torch.float32, device=device)
    counts = torch.empty(p.splits, 2, count, dtype=torch.int32, device=device)
    best = torch.empty(p.batch_splits, count, dtype=torch.float32, device=device)
    best_col = torch.empty(p.batch_splits, count, dtype=torch.int32, device=device)
    rho = torch.empty(count, dtype=torch.float32, device=device)
    index = torch.empty(count, dtype=torch.int64, device=device)
    rows_at_once = 256 if INTERPRETED else 8
    tiles = cdiv(count, rows_at_once)
    tile_sums = torch.empty(tiles, 5, dtype=torch.float64, device=device)
    tile_counts = torch.empty(tiles, 5, dtype=torch.int64, device=device)
    has = {"HAS_BATCH": batch is not None, "HAS_MEMORY": memory is not None}
    b, m = batch or _no_columns(products, row_labels), memory or _no_columns(products, row_labels)
    if count and p.splits:
        stats_kernel[(p.row_tiles, p.splits)](
            products, products.stride(0), row_labels, b.operand, b.operand.stride(0), b.labels,
            m.vectors, m.vectors.stride(0), m.labels, m.self_index if m.self_index is not None else row_labels,
            sums, counts, best, best_col,
            count, b.labels.numel(), m.labels.numel(), b.row_offset, p.batch_splits, p.batch_tiles, p.memory_tiles,
            options.margin,
            D=dim, BM=p.tile.bm, BN=p.tile.bn, BD=p.bd, CHUNKS=p.chunks, PRECISION=options.precision,
            NONZERO=options.nonzero, PAIRS=pairs, FINITE_SLOTS=_loads_ahead(options, device),
            HAS_SELF_INDEX=m.self_index is not None, **has, **p.options,
        )  # fmt: skip
    if count:
        rows_kernel[(tiles,)](
            rows, rows.stride(0), row_labels, b.vectors, b.vectors.stride(0), sums, counts, best, best_col,
            rho, index, tile_sums, tile_counts, count, b.labels.numel(), p.batch_splits, p.splits,
            options.koleo_eps, options.distance_eps,
            D=dim, BD=_finish_chunk(dim), BR=rows_at_once, BS=32, PAIRS=pairs, **has,
        )  # fmt: skip
    losses = [torch.empty((), dtype=torch.float32, device=device) for _ in range(3)]
    scales = torch.empty(5, dtype=torch.float32, device=device)
    all_sums = torch.empty(5, dtype=torch.float64, device=device)
    all_counts = torch.empty(5, dtype=torch.int64, device=device)
    if pairs:
        totals_kernel[(1,)](
            tile_sums, tile_counts, all_sums, all_counts, scales, *losses, tiles, NONZERO=options.nonzero, BT=256, **has
        )
    return Forward(*losses, scales, rho, index, all_sums, all_counts)


@on_its_device
def backward(
    rows: Tensor,
    row_labels: Tensor,
    batch: Optional[Columns],
    memory: Optional[Columns],
    options: PairOptions,
    *,
    scales: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    rho: Tensor,
    index: Tensor,
    products: Optional[Tensor] = None,
    pairs: bool = True,
    koleo: bool = True,
    tile: Optional[Tile] = None,
) -> Tensor:
    """Two launches: the gradient (N, D) in the rows' dtype.

    products: as in `forward`.
    scales: as in `Forward`. grads: 0-d float32, of the batch, memory and KoLeo loss.
    rho, index: of the batch's columns. pairs, koleo: whether these terms are in the gradient.
    """
    products = rows if products is None else products
    count, dim = rows.shape
    device = rows.device
    b, m = batch or _no_columns(products, row_labels), memory or _no_columns(products, row_labels)
    p = _plan("grad", products, batch, memory, options, tile, pairs)
    out = torch.empty(count, dim, dtype=rows.dtype, device=device)
    if out.numel() == 0:
        return out
    partial = torch.empty(p.splits, count, dim, dtype=torch.float32, device=device)
    if p.splits:
        grad_kernel[(p.row_tiles, p.splits, p.slices)](
            products, products.stride(0), row_labels, b.operand, b.operand.stride(0), b.labels,
            m.vectors, m.vectors.stride(0), m.labels, m.self_index if m.self_index is not None else row_labels,
            scales, grads[0], grads[1], partial,
            count, b.labels.numel(), m.labels.numel(), b.row_offset, p.batch_splits, p.batch_tiles, p.memory_tiles,
            options.margin,
            D=dim, BM=p.tile.bm, BN=p.tile.bn, BD=p.bd, CHUNKS=p.chunks, GRAD_CHUNKS=p.grad_chunks,
            PRECISION=options.precision, NONZERO=options.nonzero, FINITE_SLOTS=_loads_ahead(options, device),
            SKIP_INACTIVE=p.tile.skip_inactive, HAS_SELF_INDEX=m.self_index is not None,
            HAS_BATCH=p.batch_splits > 0, HAS_MEMORY=p.memory_splits > 0, **p.options,
        )  # fmt: skip
    width = _finish_chunk(dim)
    # Few rows have many splits: then one program a row, sixteen splits at once.
    rows_at_once, splits_at_once = (256, 4) if INTERPRETED else (1, 16) if count <= 512 else (8, 4)
    combine_kernel[(cdiv(count, rows_at_once), cdiv(dim, width))](
        partial, p.splits, rows, rows.stride(0), b.vectors, b.vectors.stride(0), rho, index, scales, grads[2], out,
        count, b.labels.numel(), b.row_offset, options.koleo_eps, options.distance_eps,
        D=dim, BR=rows_at_once, BD=width, BI=1024 if INTERPRETED else 128, BS=splits_at_once,
        HAS_KOLEO=koleo,
    )  # fmt: skip
    return out


def _plan(
    kind: str, rows: Tensor, batch: Optional[Columns], memory: Optional[Columns], options: PairOptions,
    tile: Optional[Tile], pairs: bool = True,
) -> Plan:  # fmt: skip
    sizes = [c.labels.numel() if c is not None and pairs else 0 for c in (batch, memory)]
    columns = tile_columns(options.precision, memory)
    return plan(kind, options.precision, columns, rows.shape[0], *sizes, rows.shape[1], rows.device, tile)


def tile_columns(precision: str, memory: Optional[Columns]) -> str:
    """The dtype of the columns by which to look up a tile: the memory's, or else the products'."""
    return product_dtype(precision) if memory is None else DTYPES[memory.vectors.dtype]


def _loads_ahead(options: PairOptions, device: torch.device) -> bool:
    """Whether finite slots are worth a kernel of their own; see `LOADS_AHEAD`."""
    return options.finite_slots and machine(device)[0] in LOADS_AHEAD


def _finish_chunk(dim: int) -> int:
    """Numbers of D that a program of `rows_kernel` or `combine_kernel` takes at once."""
    return min(1024 if INTERPRETED else 128, max(16, 1 << (dim - 1).bit_length()))


def _no_columns(rows: Tensor, labels: Tensor) -> Columns:
    """Valid pointers in place of an absent set of columns; the kernels do not read them."""
    return Columns(rows, labels[:0])


def dense(vectors: Tensor) -> Tensor:
    """The same vectors (C, D) with stride 1 along D, as the kernels need; rows keep any stride."""
    return vectors if vectors.stride(1) == 1 or vectors.shape[1] == 1 else vectors.contiguous()


def columns(vectors: Tensor, labels: Tensor, self_index: Optional[Tensor] = None, row_offset: int = 0) -> Columns:
    """`Columns` of tensors of any strides, copied where the kernels need other ones."""
    self_index = None if self_index is None else self_index.contiguous()
    return Columns(dense(vectors), labels.contiguous(), self_index, row_offset)
