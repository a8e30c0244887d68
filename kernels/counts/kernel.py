"""The kernel: tiles of similarities, summed in slices of D, beside the thresholds of their rows."""

from __future__ import annotations

import triton
import triton.language as tl

SLICE = 32  # numbers of D whose products tensor cores sum; see `similarity_error`
MOST_THRESHOLDS = 12  # of a row in one program: with 16, registers spill
MOST_COLUMNS = 32768  # of the gallery in one program: its counts have 16 bits


@triton.jit
def _slice_product(q_hi, q_lo, g_hi, g_lo):
    """(BM, BN) fp32: the sum over one slice. The product of both low parts is left out.

    The small terms come first: a tensor core truncates every term at the last bit of the largest
    one, which is then large in one of three products only.
    """
    part = tl.dot(q_hi, tl.trans(g_lo))
    part = tl.dot(q_lo, tl.trans(g_hi), part)
    return tl.dot(q_hi, tl.trans(g_hi), part)


@triton.jit
def _counts_of_tile(s, low, high):
    """(BM,) int32: 65,536 times the columns above `high`, plus the columns from `low` on.

    A comparison gives 1.0 or 0.0, because with integers each threshold takes three or four
    instructions and not two. The sums are exact for tiles of at most 128 columns.
    """
    from_low = tl.where(s >= low[:, None], 1.0, 0.0)
    above = tl.where(s > high[:, None], 1.0, 0.0)
    return tl.sum(tl.fma(above, 65536.0, from_low), 1).to(tl.int32)


@triton.jit(do_not_specialize=["gallery_tiles", "tiles"])
def count_kernel(
    query_ptr, query_stride, gallery_ptr, gallery_stride, low_ptr, high_ptr, above_ptr, within_ptr, row_stride,
    gallery_tiles, tiles,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SLICES: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, splits of `tiles` gallery tiles, parts of RB thresholds). D = SLICES * BD.

    query, gallery: as `split_halves` makes them; the low parts begin `_stride` numbers behind the
    high ones.
    low, high: (parts * RB, row_stride) fp32, thresholds of the scaled similarities.
    Adds to above and within, int32 in the same order.

    One loop over all slices of all tiles, so that the next tile is loaded during the comparisons.
    """
    first = tl.program_id(1) * tiles
    steps = (min(first + tiles, gallery_tiles) - first) * SLICES
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    query = query_ptr + row.to(tl.int64)[:, None] * D + d[None, :]
    gallery = gallery_ptr + tl.arange(0, BN)[:, None] * D + d[None, :]
    thresholds = tl.program_id(2).to(tl.int64) * RB * row_stride + row
    s = tl.zeros((BM, BN), tl.float32)
    counts = ()
    for _r in tl.static_range(RB):
        counts = counts + (tl.zeros((BM,), tl.int32),)
    for step in range(steps):
        k = step % SLICES
        q = query + k * BD
        g = gallery + ((first.to(tl.int64) + step // SLICES) * (BN * D) + k * BD)
        s += _slice_product(tl.load(q), tl.load(q + query_stride), tl.load(g), tl.load(g + gallery_stride))
        if k == SLICES - 1:
            with_tile = ()
            for r in tl.static_range(RB):
                at = thresholds + r * row_stride
                with_tile = with_tile + (counts[r] + _counts_of_tile(s, tl.load(low_ptr + at), tl.load(high_ptr + at)),)
            counts = with_tile
            s = tl.zeros((BM, BN), tl.float32)
    for r in tl.static_range(RB):
        at = thresholds + r * row_stride
        above = (counts[r] >> 16) & 65535
        tl.atomic_add(above_ptr + at, above, sem="relaxed")
        tl.atomic_add(within_ptr + at, (counts[r] & 65535) - above, sem="relaxed")
