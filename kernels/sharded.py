"""The parts of `contrastive_koleo` for many GPUs: rows of one rank against columns of all ranks.

    first = rank * n
    stats = pair_stats(my_rows, my_labels, all_rows, all_labels, row_offset=first)
    # sum stats over the ranks
    gradient = 2 * pair_grad(..., scale_pos=1 / pos_count, scale_neg=1 / neg_count)
    rho, index = nearest(my_rows, all_rows, row_offset=first)
    # gather rho and index over the ranks
    gradient += koleo_grad(my_rows, all_rows, rho, index, row_offset=first, scale=1 / N)

The 2 is there because each pair of the batch stands in two rows. No part is differentiable, and
none waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fastirt.kernels import operators, reference
from fastirt.kernels.checks import check_integers, check_options, check_vectors, choose_impl, resolve_precision
from fastirt.kernels.cpu import tiled
from fastirt.kernels.reference import KOLEO_DISTANCE_EPS, KOLEO_EPS, PairOptions
from fastirt.kernels.rounding import product_operand


class PairStats(NamedTuple):
    """Over all rows and columns, 0-d: float64 sums of losses, int64 counts of the pairs summed."""

    pos_sum: Tensor
    pos_count: Tensor
    neg_sum: Tensor
    neg_count: Tensor


class Nearest(NamedTuple):
    """Each row's distance to its nearest column and that column."""

    rho: Tensor  # (N,) float32
    index: Tensor  # (N,) int64


def pair_stats(
    rows: Tensor,
    row_labels: Tensor,
    cols: Tensor,
    col_labels: Tensor,
    *,
    row_offset: Optional[int] = None,
    self_slots: Optional[Tensor] = None,
    margin: float = 0.5,
    reduction: str = "anchor_sum",
    precision: str = "auto",
    finite_slots: bool = False,
    products: Optional[Tensor] = None,
    impl: str = "auto",
) -> PairStats:
    """Sums and counts of the pairs that cost: 1 - s of positives, s - margin of negatives.

    rows: (N, D) float32, bfloat16 or float16, L2-normalized.
    row_labels: (N,) int32 or int64; a negative label marks padding.
    cols: (M, D), like rows.
    col_labels: (M,) int32 or int64; a negative label marks padding or an empty slot.
    row_offset: row i is column i + row_offset, which is no pair.
    self_slots: (N,) int64, instead of row_offset: row i is column self_slots[i], -1 for none.
        With neither, all pairs count.
    products: the rows as `rounding.columns_for_products` makes them; None: made here, in up to four
        launches.
    margin, reduction, precision, finite_slots, impl: as in `contrastive_koleo`; the columns are
        taken as its memory is.

    A value that is not finite makes pos_sum NaN.
    Raises ValueError for a wrong shape, dtype, device or option.
    """
    options = PairOptions(margin, reduction, precision=precision, finite_slots=finite_slots)
    self_index = _self_index(rows, row_labels, cols, col_labels, row_offset, self_slots)
    check_options(options)
    if (impl := choose_impl(impl, rows)) != "triton":
        sums = tiled.pair_stats if impl == "tiled" else reference.pair_stats
        return PairStats(*sums(rows, row_labels, cols, col_labels, self_index, options))
    precision = resolve_precision(precision, rows, cols)
    products = product_operand(rows, precision) if products is None else products
    sums, counts = operators.pair_stats(
        products, row_labels, cols, col_labels, self_index, margin, reduction, precision, finite_slots
    )
    return PairStats(sums[0], counts[0], sums[1], counts[1])


def pair_grad(
    rows: Tensor,
    row_labels: Tensor,
    cols: Tensor,
    col_labels: Tensor,
    *,
    scale_pos: Tensor,
    scale_neg: Tensor,
    row_offset: Optional[int] = None,
    self_slots: Optional[Tensor] = None,
    margin: float = 0.5,
    reduction: str = "anchor_sum",
    precision: str = "auto",
    finite_slots: bool = False,
    products: Optional[Tensor] = None,
    impl: str = "auto",
) -> Tensor:
    """(N, D) in the rows' dtype: the gradient of scale_pos * pos_sum + scale_neg * neg_sum.

    Only the rows are differentiated, not the columns.

    scale_pos, scale_neg: 0-d float tensors on the rows' device.
    All others: as in `pair_stats`.

    Raises ValueError for a wrong shape, dtype, device or option.
    """
    options = PairOptions(margin, reduction, precision=precision, finite_slots=finite_slots)
    self_index = _self_index(rows, row_labels, cols, col_labels, row_offset, self_slots)
    check_options(options)
    _check_scale("scale_pos", scale_pos, rows)
    _check_scale("scale_neg", scale_neg, rows)
    if (impl := choose_impl(impl, rows)) != "triton":
        gradient = tiled.pair_grad if impl == "tiled" else reference.pair_grad
        return gradient(
            rows, row_labels, cols, col_labels, self_index, options, scale_pos=scale_pos, scale_neg=scale_neg
        )
    scales = torch.stack([scale_pos.float(), scale_neg.float()])
    precision = resolve_precision(precision, rows, cols)
    products = product_operand(rows, precision) if products is None else products
    return operators.pair_grad(
        rows, products, row_labels, cols, col_labels, self_index, scales, margin, reduction, precision, finite_slots
    )


def nearest(
    rows: Tensor,
    cols: Optional[Tensor] = None,
    *,
    row_offset: int = 0,
    row_labels: Optional[Tensor] = None,
    col_labels: Optional[Tensor] = None,
    distance_eps: float = KOLEO_DISTANCE_EPS,
    precision: str = "auto",
    products: tuple[Optional[Tensor], Optional[Tensor]] = (None, None),
    impl: str = "auto",
) -> Nearest:
    """Each row's column of largest inner product, other than itself, and the distance to it.

    rows: (N, D) float32, bfloat16 or float16.
    cols: (C, D), like rows; None: the rows.
    row_offset: row i is column i + row_offset.
    row_labels, col_labels: (N,) and (C,) integers; negative = padding. None: no padding.
    distance_eps: rho = ||row - column + distance_eps||, from the vectors as given.
    products: rows and columns as `rounding.columns_for_products` makes them; None: made here.
    precision, impl: as in `contrastive_koleo`.

    Exact ties take the lowest index. Without another column rho is 0 and the index -1.
    Raises ValueError for a wrong shape, dtype, device or option.
    """
    cols, col_labels = (rows, row_labels) if cols is None else (cols, col_labels)
    if row_labels is None:
        row_labels = torch.zeros(rows.shape[:1], dtype=torch.int64, device=rows.device)
    if col_labels is None:
        col_labels = torch.zeros(cols.shape[:1], dtype=torch.int64, device=cols.device)
    _check_pairs(rows, row_labels, cols, col_labels)
    check_options(PairOptions(precision=precision))
    if (impl := choose_impl(impl, rows)) != "triton":
        found = tiled.nearest if impl == "tiled" else reference.nearest
        with torch.no_grad():
            neighbors = found(rows, row_labels, cols, col_labels, row_offset=row_offset, distance_eps=distance_eps)
        return Nearest(*neighbors)
    precision = resolve_precision(precision, rows, cols)
    made = [product_operand(x, precision) if given is None else given for x, given in zip((rows, cols), products)]
    return Nearest(
        *operators.nearest(rows, made[0], row_labels, cols, made[1], col_labels, row_offset, distance_eps, precision)
    )


def koleo_grad(
    rows: Tensor,
    cols: Tensor,
    rho: Tensor,
    index: Tensor,
    *,
    scale: Tensor,
    row_offset: int = 0,
    koleo_eps: float = KOLEO_EPS,
    distance_eps: float = KOLEO_DISTANCE_EPS,
    impl: str = "auto",
) -> Tensor:
    """(N, D) in the rows' dtype: the gradient of -scale * sum_i log(rho_i + koleo_eps) at the rows.

    The sum is over all C columns, and the gradient flows to both ends of each pair of neighbors.

    rows: (N, D), the columns row_offset to row_offset + N - 1.
    cols: (C, D) float32, bfloat16 or float16.
    rho: (C,) float32, from `nearest`, of all columns.
    index: (C,) int64, from `nearest`, of all columns.
    scale: 0-d float tensor on the rows' device.
    koleo_eps, distance_eps: inside the logarithm; inside the norm, as given to `nearest`.
    impl: as in `contrastive_koleo`.

    Raises ValueError for a wrong shape, dtype or device.
    """
    check_vectors("rows", rows)
    check_vectors("cols", cols, rows)
    check_integers("index", index, cols, (torch.int64,))
    _check_scale("scale", scale, rows)
    if rho.shape != index.shape or rho.dtype != torch.float32 or rho.device != rows.device:
        raise ValueError("rho: needs float32, one for each column, on the rows' device")
    if not 0 <= row_offset <= cols.shape[0] - rows.shape[0]:
        raise ValueError(
            f"row_offset {row_offset}: {rows.shape[0]} rows do not fit into {cols.shape[0]} columns from there"
        )
    if choose_impl(impl, rows) != "triton":  # no tiles: it compares no pairs
        return reference.koleo_grad(
            rows, cols, rho, index, row_offset=row_offset, scale=scale, koleo_eps=koleo_eps, distance_eps=distance_eps
        )
    return operators.koleo_grad(rows, cols, rho, index, scale.float(), row_offset, koleo_eps, distance_eps)


def _check_pairs(rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor) -> None:
    check_vectors("rows", rows)
    check_integers("row_labels", row_labels, rows)
    check_vectors("cols", cols, rows)
    check_integers("col_labels", col_labels, cols)


def _self_index(rows, row_labels, cols, col_labels, row_offset, self_slots) -> Optional[Tensor]:
    """(N,) int64: each row's own column, -1 for none; or None. Checks the pairs' arguments."""
    _check_pairs(rows, row_labels, cols, col_labels)
    if self_slots is None:
        return None if row_offset is None else torch.arange(rows.shape[0], device=rows.device) + row_offset
    if row_offset is not None:
        raise ValueError("row_offset and self_slots: give one of them")
    check_integers("self_slots", self_slots, rows, (torch.int64,))
    return self_slots


def _check_scale(name: str, scale: Tensor, rows: Tensor) -> None:
    if not isinstance(scale, Tensor) or scale.dim() != 0 or scale.device != rows.device:
        raise ValueError(f"{name}: needs a 0-d tensor on {rows.device}")
