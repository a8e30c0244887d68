"""The training objective as a module: contrastive loss over batch and memory, plus lambda times KoLeo."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastirt.config.options import Config
from fastirt.errors import UserError
from fastirt.kernels import REDUCTIONS, contrastive_koleo
from fastirt.kernels.checks import IMPLEMENTATIONS, PRECISIONS, check_choice, choose_impl


class Losses(NamedTuple):
    """0-d float32 tensors; `total` = batch + memory + lambda * koleo."""

    total: Tensor
    batch: Tensor
    memory: Tensor
    koleo: Tensor


class RetrievalLoss(nn.Module):
    """Contrastive loss against batch and memory, and the KoLeo regulariser (El-Nouby et al. 2021).

    margin: cosine above which a negative pair is pushed apart. contrastive: `anchor_sum` (the paper) or `nonzero_mean`
    (pytorch-metric-learning's default reducer). lambda_reg: weight of KoLeo; it means something else under each normalisation.
    impl: `triton`, `reference` (plain PyTorch, always float32), or `auto`: Triton on a GPU that has it. precision: of the kernels' products.
    normalize: L2-normalise embeddings and memory first, in float32, as pytorch-metric-learning does; the gradient passes
    through the normalisation. False saves that where all vectors are of unit length already.
    """

    def __init__(
        self,
        margin: float = 0.5,
        contrastive: str = "anchor_sum",
        lambda_reg: float = 0.7,
        impl: str = "auto",
        precision: str = "auto",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_choice("contrastive", contrastive, REDUCTIONS)
        check_choice("impl", impl, IMPLEMENTATIONS)
        check_choice("precision", precision, PRECISIONS)
        self.margin, self.contrastive, self.lambda_reg = margin, contrastive, lambda_reg
        self.impl, self.precision, self.normalize = impl, precision, normalize

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        memory: Optional[Tensor] = None,
        memory_labels: Optional[Tensor] = None,
        memory_self: Optional[Tensor] = None,
    ) -> Losses:
        """embeddings (N, D), labels (N,) integers; memory (M, D) with memory_labels (M,), -1 = empty slot;
        memory_self (N,) int64: each row's own slot, which is no pair (-1 for none)."""
        if self.normalize:
            embeddings = F.normalize(embeddings.float(), dim=1)
            memory = None if memory is None else F.normalize(memory.float(), dim=1)
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
        )
        return Losses(parts.batch + parts.memory + self.lambda_reg * parts.koleo, *parts)

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin}, contrastive={self.contrastive!r}, lambda_reg={self.lambda_reg}, "
            f"impl={self.impl!r}, precision={self.precision!r}, normalize={self.normalize}"
        )


def _objective(config: Config, dim: int, dtype: torch.dtype, device: torch.device) -> RetrievalLoss:
    """Raises UserError where the implementation asked for cannot run."""
    given = config.objective
    precision = given.loss_precision
    if precision == "auto":
        precision = "tf32" if dtype == torch.bfloat16 else "fp32"
    try:
        choose_impl(given.loss_impl, torch.empty(0, dim, device=device))
    except ValueError as error:
        raise UserError(f"--loss-impl: {error}") from None
    return RetrievalLoss(given.margin, given.contrastive, given.lambda_reg, given.loss_impl, precision, normalize=False)
