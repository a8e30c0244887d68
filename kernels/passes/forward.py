"""Forward: one pass over the columns gives each row its pair sums and counts and its neighbor."""

from __future__ import annotations

import triton
import triton.language as tl

from fastirt.kernels.passes.tiles import active_pairs, load_chunks, load_rows, similarity


@triton.jit
def _scan(
    rows, row_labels, self_index, cols_ptr, cols_stride, labels_ptr, M, first, last, margin,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr, NONZERO: tl.constexpr, PAIRS: tl.constexpr, FINITE_SLOTS: tl.constexpr,
    NEAREST: tl.constexpr,
):  # fmt: skip
    """One tile of rows against column tiles [first, last): sums, counts and the best column.

    FINITE_SLOTS: whether columns with a negative label are finite. If so, labels do not decide what
    to load, and Triton loads the next tiles ahead.
    """
    pos_sum = tl.zeros((BM,), tl.float32)
    neg_sum = tl.zeros((BM,), tl.float32)
    finite_probe = tl.zeros((BM,), tl.float32)
    pos_count = tl.zeros((BM,), tl.int32)
    neg_count = tl.zeros((BM,), tl.int32)
    best = tl.full((BM,), float("-inf"), tl.float32)
    best_col = tl.zeros((BM,), tl.int32)
    for tile in range(first, last):
        cols = tile * BN + tl.arange(0, BN)
        col_labels = tl.load(labels_ptr + cols, mask=cols < M, other=-1)
        keep = cols < M
        if PAIRS and not FINITE_SLOTS:
            keep = col_labels >= 0
        chunks = load_chunks(cols_ptr, cols_stride, tile * BN, keep, 0, D, BN, BD, CHUNKS)
        s = similarity(rows, chunks, BM, BN, CHUNKS, PRECISION)
        if PAIRS:
            finite_probe += tl.sum(s, 1)
            positive, negative = active_pairs(s, row_labels, col_labels, self_index, cols, margin, NONZERO)
            pos_sum += tl.sum(tl.where(positive, 1.0 - s, 0.0), 1)
            neg_sum += tl.sum(tl.where(negative, s - margin, 0.0), 1)
            # Both counts in one reduction: a tile has fewer than 2^16 columns.
            counts = tl.sum(positive.to(tl.int32) + (negative.to(tl.int32) << 16), 1)
            pos_count += counts & 0xFFFF
            neg_count += counts >> 16
        if NEAREST:
            candidate = (col_labels >= 0)[None, :] & (self_index[:, None] != cols[None, :])
            tile_best, where = tl.max(
                tl.where(candidate, s, float("-inf")), 1, return_indices=True, return_indices_tie_break_left=True
            )
            closer = tile_best > best  # strictly: the lowest index wins a tie
            best = tl.where(closer, tile_best, best)
            best_col = tl.where(closer, tile * BN + where, best_col)
    # Propagate non-finite similarities of any pair, counted or not, into the loss.
    return pos_sum + finite_probe * 0.0, neg_sum, pos_count, neg_count, best, best_col


@triton.jit
def _write(sums_ptr, counts_ptr, split, index, inside, N, pos_sum, neg_sum, pos_count, neg_count):
    at = split.to(tl.int64) * 2 * N + index
    tl.store(sums_ptr + at, pos_sum, mask=inside)
    tl.store(sums_ptr + at + N, neg_sum, mask=inside)
    tl.store(counts_ptr + at, pos_count, mask=inside)
    tl.store(counts_ptr + at + N, neg_count, mask=inside)


@triton.jit(do_not_specialize=["N", "C", "M", "row_offset", "batch_splits", "batch_tiles", "memory_tiles"])
def stats_kernel(
    rows_ptr, rows_stride, row_labels_ptr,
    cols_ptr, cols_stride, col_labels_ptr,
    memory_ptr, memory_stride, memory_labels_ptr, self_index_ptr,
    sums_ptr, counts_ptr, best_ptr, best_col_ptr,
    N, C, M, row_offset, batch_splits, batch_tiles, memory_tiles, margin,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr, NONZERO: tl.constexpr, PAIRS: tl.constexpr, FINITE_SLOTS: tl.constexpr,
    HAS_SELF_INDEX: tl.constexpr, HAS_BATCH: tl.constexpr, HAS_MEMORY: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, batch splits + memory splits).

    Each of the first `batch_splits` splits takes `batch_tiles` tiles of the columns (C, D), in
    which column i + row_offset is row i itself. Each of the others takes `memory_tiles` tiles of
    the memory (M, D), in which slot self_index[i] is row i itself.

    Writes sums (splits, 2, N) fp32 and counts (splits, 2, N) int32, positive before negative, and
    the largest similarity, best (batch splits, N) fp32, with its column, best_col int32.
    """
    index, inside, row_labels = load_rows(row_labels_ptr, N, BM)
    split = tl.program_id(1)
    if HAS_BATCH:
        if split < batch_splits:
            # Loaded in each branch: rows shared by both would be in shared memory twice, if the
            # two kinds of columns differ in dtype and so in layout.
            rows = load_chunks(rows_ptr, rows_stride, tl.program_id(0) * BM, row_labels >= 0, 0, D, BM, BD, CHUNKS)
            first = split * batch_tiles
            pos_sum, neg_sum, pos_count, neg_count, best, best_col = _scan(
                rows, row_labels, index + row_offset, cols_ptr, cols_stride, col_labels_ptr, C,
                first, min(first + batch_tiles, tl.cdiv(C, BN)), margin,
                D, BM, BN, BD, CHUNKS, PRECISION, NONZERO, PAIRS, FINITE_SLOTS, True,
            )  # fmt: skip
            if PAIRS:
                _write(sums_ptr, counts_ptr, split, index, inside, N, pos_sum, neg_sum, pos_count, neg_count)
            tl.store(best_ptr + split.to(tl.int64) * N + index, best, mask=inside)
            tl.store(best_col_ptr + split.to(tl.int64) * N + index, best_col, mask=inside)
    if HAS_MEMORY:
        if split >= batch_splits:
            rows = load_chunks(rows_ptr, rows_stride, tl.program_id(0) * BM, row_labels >= 0, 0, D, BM, BD, CHUNKS)
            self_index = tl.full((BM,), -1, tl.int32)
            if HAS_SELF_INDEX:
                self_index = tl.load(self_index_ptr + index, mask=inside, other=-1).to(tl.int32)
            first = (split - batch_splits) * memory_tiles
            pos_sum, neg_sum, pos_count, neg_count, _best, _best_col = _scan(
                rows, row_labels, self_index, memory_ptr, memory_stride, memory_labels_ptr, M,
                first, min(first + memory_tiles, tl.cdiv(M, BN)), margin,
                D, BM, BN, BD, CHUNKS, PRECISION, NONZERO, PAIRS, FINITE_SLOTS, False,
            )  # fmt: skip
            _write(sums_ptr, counts_ptr, split, index, inside, N, pos_sum, neg_sum, pos_count, neg_count)
