"""Shared by the kernels: loading tiles in chunks of D, products of a given precision, active pairs.

Triton's interpreter multiplies bf16 wrongly and truncates casts to bf16; this file works around it.
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
    """fp32 x without its last BITS bits, rounded to nearest even: 16 gives bf16 values, 13 tf32."""
    bits = x.to(tl.uint32, bitcast=True)
    half: tl.constexpr = (1 << (BITS - 1)) - 1
    kept: tl.constexpr = 0x100000000 - (1 << BITS)
    rounded = ((bits + half + ((bits >> BITS) & 1)) & kept).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as a factor of a product: bf16 for "bf16", else fp32.

    "tf32" instructions ignore the last 13 bits; the interpreter, which ignores the precision of a
    product, cuts them off here.
    """
    x_float = x.to(tl.float32)
    if PRECISION == "bf16":
        if _INTERPRETED:  # fp32 products of bf16 values are what the hardware computes
            return without_last_bits(x_float, 16)
        else:
            return x.to(tl.bfloat16)
    elif PRECISION == "tf32" and _INTERPRETED:
        kept: tl.constexpr = 0x100000000 - (1 << 13)
        bits = x_float.to(tl.uint32, bitcast=True) & kept
        return tl.where(x_float == x_float, bits.to(tl.float32, bitcast=True), x_float)
    else:
        return x_float


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b for operands of `PRECISION`, summed in fp32."""
    return tl.dot(a, b, total, input_precision="tf32" if PRECISION == "tf32" else "ieee")


@triton.jit
def load_chunks(
    ptr, stride, first, keep, start, D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr
):
    """B rows of a (?, D) matrix from row `first` on, as CHUNKS chunks (B, BD) of its dtype.

    The first chunk begins at number `start` of D. Rows where `keep` (B,) is false are 0.
    """
    index = (first + tl.arange(0, B)).to(tl.int64)
    chunks = ()
    for k in tl.static_range(CHUNKS):
        d = start + k * BD + tl.arange(0, BD)
        offsets = index[:, None] * stride + d[None, :]
        chunks = chunks + (tl.load(ptr + offsets, mask=keep[:, None] & (d < D)[None, :], other=0.0),)
    return chunks


@triton.jit
def similarity(rows, cols, BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """(BM, BN) fp32 inner products of two tuples of chunks.

    Each chunk of columns is cast just before its product: if all were cast at once, all their
    copies would be in shared memory together.
    """
    s = tl.zeros((BM, BN), tl.float32)
    for k in tl.static_range(CHUNKS):
        s = product(operand(rows[k], PRECISION), tl.trans(operand(cols[k], PRECISION)), s, PRECISION)
    return s


@triton.jit
def active_pairs(s, row_labels, col_labels, self_index, cols, margin, NONZERO: tl.constexpr):
    """(positive, negative): masks (BM, BN) of the pairs of this tile whose loss counts.

    A vector with a negative label is in no pair, nor is a row with itself, self_index (BM,).
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
    """(index, inside, labels) of this program's rows; rows beyond N have label -1."""
    index = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = index < N
    return index, inside, tl.load(labels_ptr + index, mask=inside, other=-1)
