"""Counts of gallery rows by their similarity to each query: operands, launch and error bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastirt.kernels.checks import REPLACED, check_vectors, triton_or_reference
from fastirt.kernels.counts.kernel import MOST_COLUMNS, MOST_THRESHOLDS, SLICE, count_kernel
from fastirt.kernels.counts.reference import count_similarities_reference
from fastirt.kernels.passes.launch import on_its_device
from fastirt.kernels.plan import cdiv, machine
from fastirt.kernels.variants.tile_table import Tile

# By compute capability, 0 is the interpreter: the largest that `aot` compiles without spilling.
TILES = {
    0: Tile(128, 128, SLICE, 4, 1, source="interpreter"),
    80: Tile(128, 64, SLICE, 8, 4),
    90: Tile(128, 128, SLICE, 8, 4),
    100: Tile(128, 64, SLICE, 8, 4),
    103: Tile(128, 64, SLICE, 8, 4),
}
ROUNDS = 16  # programs planned for each multiprocessor, so that few are idle at the end
LARGEST = 15  # the largest number of a float16 operand is below 2^15
MOST_SCALED = 60  # most powers of two by which vectors are scaled; thresholds take twice as many


class SimilarityCounts(NamedTuple):
    above: Tensor  # (Q, R) int32: gallery rows whose similarity is above `high`
    within: Tensor  # (Q, R) int32: from `low` to `high`, both included


def similarity_error(dim: int) -> float:
    """How far similarities of `count_similarities` are from the definition's, for unit vectors.

    |s - t| <= similarity_error(D) * |q| * |g|, where t is the inner product of q and g in float64,
    rounded to float32. There is room for one rounding each of t - error and t + error to float32.

    With u = 2^-24, each in units of |q||g|:

    - The operands are x = hi + lo, two float16 numbers of 11 bits, which leaves at most 2^-22 of
      each x. The product lo * lo, at most 2^-22, is left out: 3 * 2^-22 = 12 u together.
    - A tensor core adds b products to a sum, b >= 4. It cuts each of these b + 1 terms, and the
      result, at the 24th bit of the largest, 2 u: less than 2 (b + 2) / b u <= 3 u for each of the
      SLICE products (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor
      cores", 2021). Largest term and sum are at most |q||g| of this slice, and the slices' |q||g|
      add up to at most |q||g|. The sums of hi * lo are 2^-11 times as large: 1 u covers them.
    - The sums of D / SLICE slices are added in float32: u each.
    - float32 similarities and thresholds: 4 u.

    Numbers below 2^-28 of the largest one lose relative precision, but not more than 2^-38 of the
    largest one: sqrt(D) 2^-37 covers both sides.
    """
    u = 2.0**-24
    return (12 + 3 * SLICE + 1 + cdiv(dim, SLICE) + 4) * u + dim**0.5 * 2.0**-37


@on_its_device
def count_similarities(
    query: Tensor,
    gallery: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    impl: str = "auto",
) -> SimilarityCounts:
    """How many gallery rows are more similar to a query than thresholds of this query.

    query: (Q, D), gallery: (G, D), in float32, bfloat16 or float16. Q and G may be 0.
    low, high: (Q, R) float32, low <= high, which is not checked. Infinity in both counts nothing,
        nor does NaN. Time grows with R, rounded up to a multiple of 4.
    impl: `triton`, `reference` (plain PyTorch, in float64) or `auto`: Triton on a GPU that has
        tiles, unless it failed a self-check there.

    A vector with a NaN or an infinity is in no count. Similarities deviate from exact ones by
    `similarity_error`; the counts of parts of a gallery add up to those of the whole. Nothing of
    size Q x G is stored. Vectors are copied, as two float16 numbers for each number: the rate of
    tensor cores for tf32, which has as many bits, is half of that for float16 (Ootomo and Yokota,
    "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical
    peak performance", 2022). The largest number of each side must be between 1e-13 and 1e22.

    Raises ValueError for a wrong shape, dtype, device or impl.
    """
    _check(query, gallery, low, high)
    arch, processors = machine(query.device)
    if impl == "auto" and "count_similarities" in REPLACED:
        impl = "reference"
    obstacle = None if arch in TILES else f"no tiles for compute capability {arch / 10}"
    if triton_or_reference(impl, query.device, obstacle) == "reference":
        return SimilarityCounts(*count_similarities_reference(query, gallery, low, high))
    (queries, width), count = low.shape, len(gallery)
    if not (queries and width and count):
        return SimilarityCounts(*torch.zeros(2, queries, width, dtype=torch.int32, device=query.device))
    tile = TILES[arch]
    parts = cdiv(width, MOST_THRESHOLDS)
    thresholds = cdiv(cdiv(width, parts), 4) * 4  # of a program: few kernels to compile
    queries_, query_scale = split_halves(query, tile.bm)
    gallery_, gallery_scale = split_halves(gallery, tile.bn)
    rows, columns, dim = queries_.shape[1] // tile.bm, gallery_.shape[1] // tile.bn, queries_.shape[2]
    tiles = tiles_per_program(columns, rows * parts, processors, tile)

    def arranged(values: Tensor) -> Tensor:
        """(thresholds, queries), which a program reads in order; +inf beyond the given ones."""
        full = values.new_full((parts * thresholds, rows * tile.bm), float("inf"))
        full[:width, :queries] = values.T * query_scale * gallery_scale
        return full

    counts = torch.zeros(2, parts * thresholds, rows * tile.bm, dtype=torch.int32, device=query.device)
    count_kernel[(rows, cdiv(columns, tiles), parts)](
        queries_, queries_.stride(0), gallery_, gallery_.stride(0), arranged(low), arranged(high),
        counts[0], counts[1], counts.stride(1), columns, tiles,
        D=dim, BM=tile.bm, BN=tile.bn, BD=SLICE, SLICES=dim // SLICE, RB=thresholds,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return SimilarityCounts(*counts[:, :width, :queries].transpose(1, 2).contiguous())


def split_halves(vectors: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Vectors (N, D), N and D >= 1, as sums of two float16 numbers: ((2, N', D') float16, scale).

    Both numbers are scaled by `scale`, a 0-d power of two, which lets the second one be precise.
    D' is D up to a multiple of SLICE, N' is N up to one of `rows`. What is added in D is 0, so that
    the kernel needs no masks; rows are NaN, so that they are in no count. So is a row with an
    infinity.
    """
    count, dim = vectors.shape
    vectors = vectors.float()
    finite = torch.where(vectors.isfinite(), vectors.abs(), 0)
    exponent = (LARGEST - torch.frexp(finite.amax()).exponent).clamp(-MOST_SCALED, MOST_SCALED)
    scale = torch.ldexp(torch.ones_like(finite[0, 0]), exponent)
    halves = torch.zeros(
        2, cdiv(count, rows) * rows, cdiv(dim, SLICE) * SLICE, dtype=torch.float16, device=vectors.device
    )
    scaled = vectors * scale
    halves[0, :count, :dim] = scaled
    halves[1, :count, :dim] = scaled - halves[0, :count, :dim]  # infinity less infinity is NaN
    halves[0, count:] = float("nan")
    return halves, scale


def tiles_per_program(columns: int, rows: int, processors: int, tile: Tile) -> int:
    """Gallery tiles of one program.

    columns: gallery tiles in all. rows: tiles of queries times parts of their thresholds.
    """
    splits = max(1, cdiv(ROUNDS * processors, rows))
    return min(cdiv(columns, splits), MOST_COLUMNS // tile.bn)


def _check(query: Tensor, gallery: Tensor, low: Tensor, high: Tensor) -> None:
    check_vectors("query", query)
    check_vectors("gallery", gallery, query)
    for name, values in (("low", low), ("high", high)):
        if values.dim() != 2 or len(values) != len(query) or values.dtype != torch.float32:
            raise ValueError(f"{name}: needs (Q, R) in float32 for {len(query)} queries, got {tuple(values.shape)}")
        if values.shape != low.shape or values.device != query.device:
            raise ValueError(f"{name}: needs the shape of low and the device of the queries, {query.device}")
