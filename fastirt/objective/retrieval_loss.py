"""The training objective as a module: contrastive loss over batch and memory, plus KoLeo."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastirt.config.options import Config
from fastirt.errors import UserError
from fastirt.kernels import REDUCTIONS, contrastive_koleo
from fastirt.kernels.checks import IMPLEMENTATIONS, PRECISIONS, REPLACED, check_choice, choose_impl
from fastirt.kernels.rounding import columns_for_products, drops_bits


class Losses(NamedTuple):
    """0-d float32 tensors; `total` = batch + memory + lambda * koleo."""

    total: Tensor
    batch: Tensor
    memory: Tensor
    koleo: Tensor


class RetrievalLoss(nn.Module):
    """Contrastive loss against batch and memory, plus the KoLeo regularizer.

    Equations 1 and 2 of El-Nouby et al. 2021 (arXiv 2102.05644), written out in
    `kernels/reference.py`.

    margin: cosine similarity above which a negative pair costs.
    contrastive: `anchor_sum` (the paper), or `nonzero_mean`, the default reducer of
        pytorch-metric-learning.
    lambda_reg: weight of KoLeo. The same value is a different balance under the other reduction.
    impl: `triton`, `tiled` (for a CPU, in float32), `reference` (plain PyTorch in float32) or
        `auto`: tiles on a CPU, Triton where the GPU has tiles.
    precision: of the matrix products in Triton, `bf16`, `tf32`, `fp32`, or `auto`, which follows
        the inputs (see `contrastive_koleo`, also about a float32 memory under `tf32`).
    normalize: L2-normalize embeddings and memory in float32 first, as pytorch-metric-learning does;
        the gradient passes through. False saves the time if all vectors have unit length.
    finite_slots: whether vectors with a negative label are finite too; see `contrastive_koleo`.

    Raises ValueError for an unknown contrastive, impl or precision.
    """

    def __init__(
        self,
        margin: float = 0.5,
        contrastive: str = "anchor_sum",
        lambda_reg: float = 0.7,
        impl: str = "auto",
        precision: str = "auto",
        normalize: bool = True,
        finite_slots: bool = False,
    ) -> None:
        super().__init__()
        check_choice("contrastive", contrastive, REDUCTIONS)
        check_choice("impl", impl, IMPLEMENTATIONS)
        check_choice("precision", precision, PRECISIONS)
        self.margin, self.contrastive, self.lambda_reg = margin, contrastive, lambda_reg
        self.impl, self.precision, self.normalize, self.finite_slots = impl, precision, normalize, finite_slots

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        memory: Optional[Tensor] = None,
        memory_labels: Optional[Tensor] = None,
        memory_self: Optional[Tensor] = None,
    ) -> Losses:
        """The four losses, 0-d float32, differentiable in embeddings.

        embeddings: (N, D) float32, bfloat16 or float16.
        labels: (N,) int32 or int64; a negative label marks padding.
        memory: (M, D) of any of those dtypes; it receives no gradient.
        memory_labels: (M,) int32 or int64; -1 marks an empty slot.
        memory_self: (N,) int64, each row's own slot in the memory, which is no pair; -1 for none.

        Raises ValueError for a wrong shape, dtype or device.
        """
        if self.normalize:
            embeddings = F.normalize(embeddings.float(), dim=1)
            if memory is not None:
                memory = columns_for_products(F.normalize(memory.float(), dim=1), self.precision, self.impl, embeddings)
        parts = contrastive_koleo(
            embeddings,
            labels,
            memory,
            memory_labels,
            memory_self=memory_self,
            margin=self.margin,
            reduction=self.contrastive,
            impl=self.impl,
            precision=self.precision,
            finite_slots=self.finite_slots,
        )
        return Losses(parts.batch + parts.memory + self.lambda_reg * parts.koleo, *parts)

    def rounds_memory(self, dim: int, device: torch.device) -> bool:
        """Whether a float32 memory on `device` must be rounded to tf32 when it is written."""
        return drops_bits(self.precision, self.impl, torch.empty(0, dim, device=device))

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin}, contrastive={self.contrastive!r}, lambda_reg={self.lambda_reg}, "
            f"impl={self.impl!r}, precision={self.precision!r}, normalize={self.normalize}"
        )


def build_objective(config: Config, dim: int, dtype: torch.dtype, device: torch.device) -> RetrievalLoss:
    """The objective of a run, whose encoder gives normalized embeddings of `dim` numbers.

    dtype: the encoder's; `--loss-precision auto` is fp32 unless it is bfloat16, then tf32, or bf16
        if the memory is: its numbers have 8 bits, so that tf32 would cost twice the time for none.

    Plain PyTorch if one of the objective's kernels failed the self-check on this machine.
    Raises UserError if `--loss-impl` cannot run on `device`.
    """
    objective = config.objective
    precision = objective.loss_precision
    if precision == "auto":
        precision = "fp32"
        if dtype == torch.bfloat16:
            precision = "bf16" if config.memory.memory_dtype == "bf16" else "tf32"
    impl = "reference" if REPLACED - {"gather_views", "count_similarities"} else objective.loss_impl
    try:
        choose_impl(impl, torch.empty(0, dim, device=device))
    except ValueError as error:
        raise UserError(f"--loss-impl: {error}") from None
    return RetrievalLoss(
        objective.margin,
        objective.contrastive,
        objective.lambda_reg,
        impl,
        precision,
        normalize=False,
        finite_slots=True,  # the memory starts with zeros, and a step that is not finite is undone
    )
