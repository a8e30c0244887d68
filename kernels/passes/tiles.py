"""What the kernels share: tiles of rows in chunks of D, products of a stated precision, which pairs count.

The interpreter's own faults (wrong bf16 products, casts to bf16 that truncate) are worked around here and nowhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastirt.kernels.reference import PAIR_THRESHOLD

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)
_PAIR_THRESHOLD = tl.constexpr(PAIR_THRESHOLD)


@triton.jit
def without_last_bits(x, BITS: tl.constexpr):
    """fp32 x rounded to nearest even in its last BITS bits: 16 leave a bf16 number, 13 a tf32 number."""
    bits = x.to(tl.uint32, bitcast=True)
    half: tl.constexpr = (1 << (BITS - 1)) - 1
    kept: tl.constexpr = 0x100000000 - (1 << BITS)
    rounded = ((bits + half + ((bits >> BITS) & 1)) & kept).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as a factor of a product: bf16 for "bf16", else fp32 (of which "tf32" drops bits inside the product)."""
    x_float = x.to(tl.float32)
    if PRECISION == "bf16":
        if _INTERPRETED:  # rounded bf16 values multiplied in fp32: what the hardware's product gives
            return without_last_bits(x_float, 16)
        else:
            return x.to(tl.bfloat16)
    else:
        return x_float


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b for operands of `PRECISION`, summed in fp32."""
    return tl.dot(a, b, total, input_precision="tf32" if PRECISION == "tf32" else "ieee")


@triton.jit
def load_chunks(
    ptr, stride, first, keep, start, D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows first ... first + B of a (?, D) matrix from column `start` on, as CHUNKS operands (B, BD); 0 where `keep` (B,) is false."""
    index = (first + tl.arange(0, B)).to(tl.int64)
    chunks = ()
    for k in tl.static_range(CHUNKS):
        d = start + k * BD + tl.arange(0, BD)
        offsets = index[:, None] * stride + d[None, :]
        chunk = tl.load(ptr + offsets, mask=keep[:, None] & (d < D)[None, :], other=0.0)
        chunks = chunks + (operand(chunk, PRECISION),)
    return chunks


@triton.jit
def similarity(rows, cols, BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """(BM, BN) fp32 inner products of two tuples of chunks."""
    s = tl.zeros((BM, BN), tl.float32)
    for k in tl.static_range(CHUNKS):
        s = product(rows[k], tl.trans(cols[k]), s, PRECISION)
    return s


@triton.jit
def active_pairs(s, row_labels, col_labels, self_index, cols, margin, NONZERO: tl.constexpr):
    """(positive, negative): the pairs of this tile whose loss counts, as two (BM, BN) masks.

    Negative labels are in no pair; `self_index` (BM,) is the column that is the row itself.
    """
    valid = (row_labels >= 0)[:, None] & (col_labels >= 0)[None, :] & (self_index[:, None] != cols[None, :])
    same = row_labels[:, None] == col_labels[None, :]
    positive, negative = valid & same, valid & (same == 0)
    if NONZERO:
        return positive & (1.0 - s > _PAIR_THRESHOLD), negative & (s - margin > _PAIR_THRESHOLD)
    else:
        return positive, negative & (s > margin)


@triton.jit
def load_rows(labels_ptr, N, BM: tl.constexpr):
    """(index, inside, labels) of this program's tile of rows; labels are -1 outside."""
    index = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = index < N
    return index, inside, tl.load(labels_ptr + index, mask=inside, other=-1)
