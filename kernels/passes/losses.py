"""Forward, second half: add up the splits of each row, then the rows to the three losses.

All sums are fp64 and in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _over_splits(sums_ptr, counts_ptr, first, last, N, index, inside, BR: tl.constexpr, BS: tl.constexpr):
    """Totals of this tile of rows over splits [first, last): two fp64 and two int64 scalars."""
    pos_sum = tl.zeros((BS, BR), tl.float64)
    neg_sum = tl.zeros((BS, BR), tl.float64)
    pos_count = tl.zeros((BS, BR), tl.int64)
    neg_count = tl.zeros((BS, BR), tl.int64)
    for start in range(first, last, BS):
        split = start + tl.arange(0, BS)
        mask = (split < last)[:, None] & inside[None, :]
        at = split.to(tl.int64)[:, None] * 2 * N + index[None, :]
        pos_sum += tl.load(sums_ptr + at, mask=mask, other=0.0).to(tl.float64)
        neg_sum += tl.load(sums_ptr + at + N, mask=mask, other=0.0).to(tl.float64)
        pos_count += tl.load(counts_ptr + at, mask=mask, other=0).to(tl.int64)
        neg_count += tl.load(counts_ptr + at + N, mask=mask, other=0).to(tl.int64)
    return (
        tl.sum(tl.sum(pos_sum, 0), 0), tl.sum(tl.sum(neg_sum, 0), 0),
        tl.sum(tl.sum(pos_count, 0), 0), tl.sum(tl.sum(neg_count, 0), 0),
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "C", "batch_splits", "splits"])
def rows_kernel(
    rows_ptr, rows_stride, row_labels_ptr, cols_ptr, cols_stride,
    sums_ptr, counts_ptr, best_ptr, best_col_ptr,
    rho_ptr, index_ptr, tile_sums_ptr, tile_counts_ptr,
    N, C, batch_splits, splits, koleo_eps, distance_eps,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    HAS_BATCH: tl.constexpr, HAS_MEMORY: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles). Writes rho (N,) fp32 = ||row - nearest + distance_eps||, index (N,) int64.

    Also writes five sums of each tile (batch positive, batch negative, memory positive, memory
    negative, log(rho + koleo_eps)) and five counts (the same four, rows).
    """
    tile = tl.program_id(0)
    index = tile * BR + tl.arange(0, BR)
    inside = index < N
    valid = tl.load(row_labels_ptr + index, mask=inside, other=-1) >= 0
    sums_at, counts_at = tile_sums_ptr + tile * 5, tile_counts_ptr + tile * 5
    if HAS_BATCH:
        if PAIRS:
            pos_sum, neg_sum, pos_count, neg_count = _over_splits(
                sums_ptr, counts_ptr, 0, batch_splits, N, index, inside, BR, BS
            )
            tl.store(sums_at, pos_sum)
            tl.store(sums_at + 1, neg_sum)
            tl.store(counts_at, pos_count)
            tl.store(counts_at + 1, neg_count)
        best = tl.full((BR,), float("-inf"), tl.float32)
        nearest = tl.zeros((BR,), tl.int32)
        for split in range(0, batch_splits):
            at = split * N + index
            value = tl.load(best_ptr + at, mask=inside, other=float("-inf"))
            closer = value > best
            best = tl.where(closer, value, best)
            nearest = tl.where(closer, tl.load(best_col_ptr + at, mask=inside, other=0), nearest)
        has_neighbor = valid & (best > float("-inf"))
        square = tl.zeros((BR,), tl.float32)
        nan_flag = tl.zeros((BR,), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            keep = valid[:, None] & (d < D)[None, :]
            row = tl.load(rows_ptr + index.to(tl.int64)[:, None] * rows_stride + d[None, :], mask=keep, other=0.0)
            at = nearest.to(tl.int64)[:, None] * cols_stride + d[None, :]
            neighbor = tl.load(cols_ptr + at, mask=has_neighbor[:, None] & keep, other=0.0)
            difference = row.to(tl.float32) - neighbor.to(tl.float32) + tl.where(keep, distance_eps, 0.0)
            square += tl.sum(difference * difference, 1)
            nan_flag += tl.sum(row.to(tl.float32) * 0.0, 1)
        rho = tl.sqrt(square)
        logarithm = tl.where(has_neighbor, tl.log(rho + koleo_eps), 0.0) + nan_flag
        tl.store(rho_ptr + index, tl.where(has_neighbor, rho, 0.0) + nan_flag, mask=inside)
        tl.store(index_ptr + index, tl.where(has_neighbor, nearest, -1).to(tl.int64), mask=inside)
        tl.store(sums_at + 4, tl.sum(logarithm.to(tl.float64), 0))
    if HAS_MEMORY:
        pos_sum, neg_sum, pos_count, neg_count = _over_splits(
            sums_ptr, counts_ptr, batch_splits, splits, N, index, inside, BR, BS
        )
        tl.store(sums_at + 2, pos_sum)
        tl.store(sums_at + 3, neg_sum)
        tl.store(counts_at + 2, pos_count)
        tl.store(counts_at + 3, neg_count)
    tl.store(counts_at + 4, tl.sum(valid.to(tl.int64), 0))


@triton.jit
def _total(tile_sums_ptr, tile_counts_ptr, column, tiles, BT: tl.constexpr):
    total = tl.zeros((BT,), tl.float64)
    count = tl.zeros((BT,), tl.int64)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        total += tl.load(tile_sums_ptr + tile * 5 + column, mask=tile < tiles, other=0.0)
        count += tl.load(tile_counts_ptr + tile * 5 + column, mask=tile < tiles, other=0)
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def _part(
    tile_sums_ptr, tile_counts_ptr, sums_ptr, counts_ptr, scales_ptr, loss_ptr, column: tl.constexpr, tiles, rows,
    NONZERO: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One contrastive loss: totals, value, and the weights of a positive and a negative pair."""
    pos_sum, pos_count = _total(tile_sums_ptr, tile_counts_ptr, column, tiles, BT)
    neg_sum, neg_count = _total(tile_sums_ptr, tile_counts_ptr, column + 1, tiles, BT)
    if NONZERO:
        pos_scale = 1.0 / tl.maximum(pos_count, 1).to(tl.float64)
        neg_scale = 1.0 / tl.maximum(neg_count, 1).to(tl.float64)
    else:
        pos_scale = 1.0 / tl.maximum(rows, 1).to(tl.float64)
        neg_scale = pos_scale
    loss = pos_sum * pos_scale + neg_sum * neg_scale
    nan_flag = loss * 0.0
    tl.store(sums_ptr + column, pos_sum)
    tl.store(sums_ptr + column + 1, neg_sum)
    tl.store(counts_ptr + column, pos_count)
    tl.store(counts_ptr + column + 1, neg_count)
    tl.store(scales_ptr + column, (pos_scale + nan_flag).to(tl.float32))
    tl.store(scales_ptr + column + 1, (neg_scale + nan_flag).to(tl.float32))
    tl.store(loss_ptr, loss.to(tl.float32))


@triton.jit
def _no_part(sums_ptr, counts_ptr, scales_ptr, loss_ptr, column: tl.constexpr):
    for k in tl.static_range(2):
        tl.store(sums_ptr + column + k, 0.0)
        tl.store(counts_ptr + column + k, 0)
        tl.store(scales_ptr + column + k, 0.0)
    tl.store(loss_ptr, 0.0)


@triton.jit(do_not_specialize=["tiles"])
def totals_kernel(
    tile_sums_ptr, tile_counts_ptr, sums_ptr, counts_ptr, scales_ptr, batch_ptr, memory_ptr, koleo_ptr, tiles,
    NONZERO: tl.constexpr, HAS_BATCH: tl.constexpr, HAS_MEMORY: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program. Writes sums (5,) fp64, counts (5,) int64 and the three losses, 0-d fp32.

    Writes scales (5,) fp32: weights of a pair in its loss (batch +, -, memory +, -), KoLeo's 1/N.
    """
    log_sum, rows = _total(tile_sums_ptr, tile_counts_ptr, 4, tiles, BT)
    tl.store(counts_ptr + 4, rows)
    if HAS_BATCH:
        _part(tile_sums_ptr, tile_counts_ptr, sums_ptr, counts_ptr, scales_ptr, batch_ptr, 0, tiles, rows, NONZERO, BT)
        per_row = 1.0 / tl.maximum(rows, 1).to(tl.float64)
        tl.store(sums_ptr + 4, log_sum)
        tl.store(scales_ptr + 4, (per_row + log_sum * 0.0).to(tl.float32))
        tl.store(koleo_ptr, (-log_sum * per_row).to(tl.float32))
    else:
        _no_part(sums_ptr, counts_ptr, scales_ptr, batch_ptr, 0)
        tl.store(sums_ptr + 4, 0.0)
        tl.store(scales_ptr + 4, 0.0)
        tl.store(koleo_ptr, 0.0)
    if HAS_MEMORY:
        _part(tile_sums_ptr, tile_counts_ptr, sums_ptr, counts_ptr, scales_ptr, memory_ptr, 2, tiles, rows, NONZERO, BT)
    else:
        _no_part(sums_ptr, counts_ptr, scales_ptr, memory_ptr, 2)
