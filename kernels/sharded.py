"""The parts of `contrastive_koleo`, for training on many GPUs: other rows than columns, and totals that ranks sum up in between.

    stats = pair_stats(my_rows, my_labels, all_rows, all_labels, row_offset=rank * n)    # then sum over the ranks
    gradient = 2 * pair_grad(..., scale_pos=1 / pos_count, scale_neg=1 / neg_count)      # a batch pair stands in two rows
    rho, index = nearest(my_rows, all_rows, row_offset=rank * n)                         # then gather over the ranks
    gradient += koleo_grad(my_rows, all_rows, all_rho, all_index, row_offset=rank * n, scale=1 / N)

None is differentiable; each is a torch operator on either implementation, with no wait for the device.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fastirt.kernels import launch, reference
from fastirt.kernels.checks import (
    PRECISIONS,
    check_choice,
    check_integers,
    check_vectors,
    choose_impl,
    resolve_precision,
)
from fastirt.kernels.reference import KOLEO_DISTANCE_EPS, KOLEO_EPS, REDUCTIONS


class PairStats(NamedTuple):
    """Over all rows and columns, 0-d: sums in float64, counts of the pairs summed in int64."""

    pos_sum: Tensor
    pos_count: Tensor
    neg_sum: Tensor
    neg_count: Tensor


class Nearest(NamedTuple):
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
    impl: str = "auto",
) -> PairStats:
    """(pos_sum, pos_count, neg_sum, neg_count) of the pairs that cost: sum of 1 - s over positives, of s - margin over negatives.

    rows (N, D) with row_labels (N,), cols (M, D) with col_labels (M,): as in `contrastive_koleo`. The column that is the
    row itself is row + row_offset, or self_slots[row] (-1: none); with neither, all pairs count. A value that is not finite
    gives a NaN pos_sum. Raises ValueError.
    """
    self_index = _self_index(rows, row_labels, cols, col_labels, row_offset, self_slots)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("precision", precision, PRECISIONS)
    if choose_impl(impl, rows) == "reference":
        found = reference.pair_stats(
            rows, row_labels, cols, col_labels, self_index=self_index, margin=margin, reduction=reduction
        )
        return PairStats(*found)
    sums, counts = _pair_stats(rows, row_labels, cols, col_labels, self_index, margin, reduction, precision)
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
    impl: str = "auto",
) -> Tensor:
    """(N, D) in the rows' dtype: the gradient of scale_pos * pos_sum + scale_neg * neg_sum of `pair_stats` in the rows alone.

    scale_pos, scale_neg: 0-d float tensors on the device. Raises ValueError.
    """
    self_index = _self_index(rows, row_labels, cols, col_labels, row_offset, self_slots)
    check_choice("reduction", reduction, REDUCTIONS)
    _check_scale("scale_pos", scale_pos, rows)
    _check_scale("scale_neg", scale_neg, rows)
    check_choice("precision", precision, PRECISIONS)
    if choose_impl(impl, rows) == "reference":
        return reference.pair_grad(
            rows, row_labels, cols, col_labels, self_index=self_index, scale_pos=scale_pos, scale_neg=scale_neg, margin=margin,
            reduction=reduction,
        )  # fmt: skip
    scales = torch.stack([scale_pos.float(), scale_neg.float()])
    return _pair_grad(rows, row_labels, cols, col_labels, self_index, scales, margin, reduction, precision)


def nearest(
    rows: Tensor,
    cols: Optional[Tensor] = None,
    *,
    row_offset: int = 0,
    row_labels: Optional[Tensor] = None,
    col_labels: Optional[Tensor] = None,
    distance_eps: float = KOLEO_DISTANCE_EPS,
    precision: str = "auto",
    impl: str = "auto",
) -> Nearest:
    """(rho, index): the column with the largest inner product, other than row + row_offset, and its distance
    ||row - column + distance_eps||, from the vectors as given. Exact ties: lowest index. None: rho 0, index -1.

    rows (N, D), cols (C, D), by default the rows; a negative label marks padding (no labels: none). Raises ValueError.
    """
    cols, col_labels = (rows, row_labels) if cols is None else (cols, col_labels)
    if row_labels is None:
        row_labels = torch.zeros(rows.shape[:1], dtype=torch.int64, device=rows.device)
    if col_labels is None:
        col_labels = torch.zeros(cols.shape[:1], dtype=torch.int64, device=cols.device)
    _self_index(rows, row_labels, cols, col_labels, row_offset, None)
    check_choice("precision", precision, PRECISIONS)
    if choose_impl(impl, rows) == "reference":
        with torch.no_grad():
            found = reference.nearest(
                rows, row_labels, cols, col_labels, row_offset=row_offset, distance_eps=distance_eps
            )
        return Nearest(*found)
    return Nearest(*_nearest(rows, row_labels, cols, col_labels, row_offset, distance_eps, precision))


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
    """(N, D) in the rows' dtype: the gradient of -scale * sum_i log(rho_i + koleo_eps) over all columns i, at the rows alone,
    which are columns row_offset ... row_offset + N. rho (C,) and index (C,) are those of all columns, index into the columns;
    the gradient flows to both ends of each pair. scale: 0-d float tensor on the device. Raises ValueError."""
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
    if choose_impl(impl, rows) == "reference":
        return reference.koleo_grad(
            rows, cols, rho, index, row_offset=row_offset, scale=scale, koleo_eps=koleo_eps, distance_eps=distance_eps
        )
    return _koleo_grad(rows, cols, rho, index, scale.float(), row_offset, koleo_eps, distance_eps)


def _self_index(rows, row_labels, cols, col_labels, row_offset, self_slots) -> Optional[Tensor]:
    """Check what all parts take; each row's own column."""
    check_vectors("rows", rows)
    check_integers("row_labels", row_labels, rows)
    check_vectors("cols", cols, rows)
    check_integers("col_labels", col_labels, cols)
    if self_slots is None:
        return None if row_offset is None else torch.arange(rows.shape[0], device=rows.device) + row_offset
    if row_offset is not None:
        raise ValueError("row_offset and self_slots: give one of them")
    check_integers("self_slots", self_slots, rows, (torch.int64,))
    return self_slots


def _check_scale(name: str, scale: Tensor, rows: Tensor) -> None:
    if not isinstance(scale, Tensor) or scale.dim() != 0 or scale.device != rows.device:
        raise ValueError(f"{name}: needs a 0-d tensor on {rows.device}")


@torch.library.custom_op("fastirt::pair_stats", mutates_args=())
def _pair_stats(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, self_index: Optional[Tensor], margin: float,
    reduction: str, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    memory = launch.columns(cols, col_labels, self_index)
    found = launch.forward(
        launch.dense(rows), row_labels.contiguous(), None, memory, margin=margin, nonzero=reduction == "nonzero_mean",
        koleo_eps=0.0, distance_eps=0.0, precision=resolve_precision(precision, rows, cols),
    )  # fmt: skip
    return found.sums[2:4].clone(), found.counts[2:4].clone()


@_pair_stats.register_fake
def _(rows, *_):
    return rows.new_empty(2, dtype=torch.float64), rows.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("fastirt::pair_grad", mutates_args=())
def _pair_grad(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, self_index: Optional[Tensor], scales: Tensor,
    margin: float, reduction: str, precision: str,
) -> Tensor:  # fmt: skip
    one = scales.new_ones(())
    return launch.backward(
        launch.dense(rows), row_labels.contiguous(), None, launch.columns(cols, col_labels, self_index),
        scales=torch.cat([scales, scales]), grads=(one, one, one), rho=one, index=row_labels, margin=margin,
        nonzero=reduction == "nonzero_mean", koleo_eps=0.0, distance_eps=0.0,
        precision=resolve_precision(precision, rows, cols), koleo=False,
    )  # fmt: skip


@_pair_grad.register_fake
def _(rows, *_):
    return rows.new_empty(rows.shape)


@torch.library.custom_op("fastirt::nearest", mutates_args=())
def _nearest(
    rows: Tensor, row_labels: Tensor, cols: Tensor, col_labels: Tensor, row_offset: int, distance_eps: float,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = launch.forward(
        launch.dense(rows), row_labels.contiguous(), launch.columns(cols, col_labels, row_offset=row_offset), None,
        margin=0.0, nonzero=False, koleo_eps=0.0, distance_eps=distance_eps,
        precision=resolve_precision(precision, rows, cols), pairs=False,
    )  # fmt: skip
    return found.rho, found.index


@_nearest.register_fake
def _(rows, *_):
    return rows.new_empty(rows.shape[0], dtype=torch.float32), rows.new_empty(rows.shape[0], dtype=torch.int64)


@torch.library.custom_op("fastirt::koleo_grad", mutates_args=())
def _koleo_grad(
    rows: Tensor, cols: Tensor, rho: Tensor, index: Tensor, scale: Tensor, row_offset: int, koleo_eps: float,
    distance_eps: float,
) -> Tensor:  # fmt: skip
    return launch.backward(
        launch.dense(rows), index, launch.columns(cols, index, row_offset=row_offset), None, scales=scale.new_ones(5),
        grads=(scale, scale, scale), rho=rho.contiguous(), index=index.contiguous(), margin=0.0, nonzero=False,
        koleo_eps=koleo_eps, distance_eps=distance_eps, precision="fp32", pairs=False,
    )  # fmt: skip


@_koleo_grad.register_fake
def _(rows, *_):
    return rows.new_empty(rows.shape)
