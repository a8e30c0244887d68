"""Backward: recompute the similarities tile by tile and sum weighted columns to each gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from fastirt.kernels.passes.tiles import (
    active_pairs,
    load_chunks,
    load_rows,
    operand,
    product,
    similarity,
    without_last_bits,
)


@triton.jit
def pair_weights(pos_scale, neg_scale, PRECISION: tl.constexpr):
    """(unit, p, q): pos_scale = unit * p and neg_scale = unit * q, p and q exact in PRECISION.

    pos_scale / neg_scale has 24 bits, bf16 has 8 and tf32 has 11: of 128 candidates for q, take the
    one whose p loses least by rounding. The relative error is then 2^-16 in bf16 and 2^-19 in tf32
    for most quotients; close to a simple fraction, up to that of plain rounding, 2^-9 and 2^-12.
    """
    ratio = pos_scale / tl.where(neg_scale != 0.0, neg_scale, 1.0)
    if PRECISION == "fp32":
        p, q = ratio, 1.0
    else:
        candidates = (128 + tl.arange(0, 128)).to(tl.float32)
        exact = candidates * ratio
        rounded = without_last_bits(exact, 16 if PRECISION == "bf16" else 13)
        chosen = tl.argmin(tl.abs(rounded - exact) / candidates, 0)
        p = tl.sum(tl.where(tl.arange(0, 128) == chosen, rounded, 0.0), 0)
        q = (128 + chosen).to(tl.float32)
    if neg_scale != 0.0:
        unit = neg_scale / q
    else:
        unit, p, q = pos_scale, 1.0, 0.0
    return unit, p, q


@triton.jit
def _scan_grad(
    rows, row_labels, self_index, cols_ptr, cols_stride, labels_ptr, M, first, last, margin, pos_scale, neg_scale,
    start,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
    GRAD_CHUNKS: tl.constexpr, PRECISION: tl.constexpr, NONZERO: tl.constexpr, FINITE_SLOTS: tl.constexpr,
    SKIP_INACTIVE: tl.constexpr,
):  # fmt: skip
    """sum_j weight_ij * column_j over column tiles [first, last): GRAD_CHUNKS chunks (BM, BD).

    The first chunk begins at number `start` of D. FINITE_SLOTS: as in `_scan`.
    """
    unit, p, q = pair_weights(pos_scale, neg_scale, PRECISION)
    totals = ()
    for _ in tl.static_range(GRAD_CHUNKS):
        totals = totals + (tl.zeros((BM, BD), tl.float32),)
    for tile in range(first, last):
        cols = tile * BN + tl.arange(0, BN)
        col_labels = tl.load(labels_ptr + cols, mask=cols < M, other=-1)
        keep = cols < M
        if not FINITE_SLOTS:  # the weight of such a column is 0, but 0 * NaN is NaN
            keep = col_labels >= 0
        chunks = load_chunks(cols_ptr, cols_stride, tile * BN, keep, 0, D, BN, BD, CHUNKS)
        s = similarity(rows, chunks, BM, BN, CHUNKS, PRECISION)
        positive, negative = active_pairs(s, row_labels, col_labels, self_index, cols, margin, NONZERO)
        if GRAD_CHUNKS < CHUNKS:
            chunks = load_chunks(cols_ptr, cols_stride, tile * BN, keep, start, D, BN, BD, GRAD_CHUNKS)
        any_active = True
        if SKIP_INACTIVE:
            any_active = tl.max(tl.max((positive | negative).to(tl.int32), 1), 0) > 0
        if any_active:
            weight = operand(tl.where(negative, q, tl.where(positive, -p, 0.0)), PRECISION)
            next_totals = ()
            for k in tl.static_range(GRAD_CHUNKS):
                next_totals = next_totals + (product(weight, operand(chunks[k], PRECISION), totals[k], PRECISION),)
            totals = next_totals
    scaled = ()
    for k in tl.static_range(GRAD_CHUNKS):
        scaled = scaled + (totals[k] * unit,)
    return scaled


@triton.jit(do_not_specialize=["N", "C", "M", "row_offset", "batch_splits", "batch_tiles", "memory_tiles"])
def grad_kernel(
    rows_ptr, rows_stride, row_labels_ptr,
    cols_ptr, cols_stride, col_labels_ptr,
    memory_ptr, memory_stride, memory_labels_ptr, self_index_ptr,
    scales_ptr, grad_batch_ptr, grad_memory_ptr, partial_ptr,
    N, C, M, row_offset, batch_splits, batch_tiles, memory_tiles, margin,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
    GRAD_CHUNKS: tl.constexpr, PRECISION: tl.constexpr, NONZERO: tl.constexpr, FINITE_SLOTS: tl.constexpr,
    SKIP_INACTIVE: tl.constexpr, HAS_SELF_INDEX: tl.constexpr, HAS_BATCH: tl.constexpr, HAS_MEMORY: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, batch splits + memory splits, slices of D). Splits as in `stats_kernel`.

    scales: (4,) fp32, weight of a positive and a negative pair of the batch, then of the memory.
    grad_batch, grad_memory: 0-d fp32 factors of these weights. A pair of the batch stands in two
        rows of the loss, hence its factor 2.
    Writes partial (splits, N, D) fp32.
    """
    index, inside, row_labels = load_rows(row_labels_ptr, N, BM)
    split = tl.program_id(1)
    start = tl.program_id(2) * GRAD_CHUNKS * BD
    if HAS_BATCH:
        if split < batch_splits:
            # Loaded in each branch: rows shared by both would be in shared memory twice, if the
            # two kinds of columns differ in dtype and so in layout.
            rows = load_chunks(rows_ptr, rows_stride, tl.program_id(0) * BM, row_labels >= 0, 0, D, BM, BD, CHUNKS)
            first = split * batch_tiles
            grad = 2.0 * tl.load(grad_batch_ptr)
            totals = _scan_grad(
                rows, row_labels, index + row_offset, cols_ptr, cols_stride, col_labels_ptr, C,
                first, min(first + batch_tiles, tl.cdiv(C, BN)), margin,
                grad * tl.load(scales_ptr), grad * tl.load(scales_ptr + 1), start,
                D, BM, BN, BD, CHUNKS, GRAD_CHUNKS, PRECISION, NONZERO, FINITE_SLOTS, SKIP_INACTIVE,
            )  # fmt: skip
            _store(partial_ptr, split, index, inside, start, N, totals, D, BD, GRAD_CHUNKS)
    if HAS_MEMORY:
        if split >= batch_splits:
            rows = load_chunks(rows_ptr, rows_stride, tl.program_id(0) * BM, row_labels >= 0, 0, D, BM, BD, CHUNKS)
            self_index = tl.full((BM,), -1, tl.int32)
            if HAS_SELF_INDEX:
                self_index = tl.load(self_index_ptr + index, mask=inside, other=-1).to(tl.int32)
            first = (split - batch_splits) * memory_tiles
            grad = tl.load(grad_memory_ptr)
            totals = _scan_grad(
                rows, row_labels, self_index, memory_ptr, memory_stride, memory_labels_ptr, M,
                first, min(first + memory_tiles, tl.cdiv(M, BN)), margin,
                grad * tl.load(scales_ptr + 2), grad * tl.load(scales_ptr + 3), start,
                D, BM, BN, BD, CHUNKS, GRAD_CHUNKS, PRECISION, NONZERO, FINITE_SLOTS, SKIP_INACTIVE,
            )  # fmt: skip
            _store(partial_ptr, split, index, inside, start, N, totals, D, BD, GRAD_CHUNKS)


@triton.jit
def _store(
    partial_ptr, split, index, inside, start, N, totals, D: tl.constexpr, BD: tl.constexpr, GRAD_CHUNKS: tl.constexpr
):
    for k in tl.static_range(GRAD_CHUNKS):
        d = start + k * BD + tl.arange(0, BD)
        at = (split.to(tl.int64) * N + index)[:, None] * D + d[None, :]
        tl.store(partial_ptr + at, totals[k], mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def koleo_pull(rho, koleo_eps, scale):
    """d(loss)/d(rho) / rho at distance rho from the nearest row; 0 at rho = 0, as a norm has."""
    return tl.where(rho > 0.0, -scale / ((rho + koleo_eps) * tl.where(rho > 0.0, rho, 1.0)), 0.0)


@triton.jit(do_not_specialize=["N", "C", "splits", "row_offset"])
def combine_kernel(
    partial_ptr, splits, rows_ptr, rows_stride, cols_ptr, cols_stride, rho_ptr, index_ptr,
    scales_ptr, grad_koleo_ptr, out_ptr,
    N, C, row_offset, koleo_eps, distance_eps,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BS: tl.constexpr,
    HAS_KOLEO: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, chunks of D). out (N, D) = sum of partial (splits, N, D) + KoLeo's gradient.

    rho, index: (C,), of all columns; row i is column i + row_offset.

    KoLeo's gradient of a row has one term for the row's own nearest column and one for every column
    whose nearest is the row, added in the order of the columns. Each comes from the difference of
    two vectors.
    """
    index = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = index < N
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = inside[:, None] & (d < D)[None, :]
    total = tl.zeros((BR, BD), tl.float32)
    # Several splits at once: one at a time, each load would wait for the one before.
    for first in range(0, splits, BS):
        split = first + tl.arange(0, BS)
        at = (split.to(tl.int64)[:, None, None] * N + index[None, :, None]) * D + d[None, None, :]
        total += tl.sum(
            tl.load(partial_ptr + at, mask=(split < splits)[:, None, None] & mask[None, :, :], other=0.0), 0
        )
    if HAS_KOLEO:
        scale = tl.load(grad_koleo_ptr) * tl.load(scales_ptr + 4)
        column = index + row_offset
        nearest = tl.load(index_ptr + column, mask=inside, other=-1)
        keep = ((nearest >= 0) & (nearest < C))[:, None] & mask
        row = tl.load(rows_ptr + index.to(tl.int64)[:, None] * rows_stride + d[None, :], mask=mask, other=0.0)
        row = row.to(tl.float32)
        neighbor = tl.load(cols_ptr + nearest[:, None] * cols_stride + d[None, :], mask=keep, other=0.0).to(tl.float32)
        pull = koleo_pull(tl.load(rho_ptr + column, mask=inside, other=0.0), koleo_eps, scale)
        total += tl.where(keep, pull[:, None] * (row - neighbor + distance_eps), 0.0)
        for start in range(0, C, BI):
            i = start + tl.arange(0, BI)
            neighbors = tl.load(index_ptr + i, mask=i < C, other=-1)
            left = neighbors[None, :] == column[:, None]  # (BR, BI): pulls not yet added
            while tl.max(tl.max(left.to(tl.int32), 1), 0) > 0:
                lowest = tl.min(tl.where(left, i[None, :], C), 1)
                found = lowest < C
                left = left & (i[None, :] != lowest[:, None])
                puller = tl.load(
                    cols_ptr + lowest.to(tl.int64)[:, None] * cols_stride + d[None, :],
                    mask=found[:, None] & mask, other=0.0,
                ).to(tl.float32)  # fmt: skip
                pull = koleo_pull(tl.load(rho_ptr + lowest, mask=found, other=0.0), koleo_eps, scale)
                total -= tl.where(found[:, None] & mask, pull[:, None] * (puller - row + distance_eps), 0.0)
    tl.store(out_ptr + index.to(tl.int64)[:, None] * D + d[None, :], total, mask=mask)
