"""The objective's mathematics, usable alone: contrastive loss over batch and memory, and KoLeo, as Triton kernels and in plain PyTorch."""

from fastirt.kernels.contrastive import contrastive_koleo
from fastirt.kernels.gather import gather_views
from fastirt.kernels.reference import PAIR_THRESHOLD, REDUCTIONS, ContrastiveKoLeo
from fastirt.kernels.sharded import Nearest, PairStats, koleo_grad, nearest, pair_grad, pair_stats

__all__ = [
    "PAIR_THRESHOLD", "REDUCTIONS", "ContrastiveKoLeo", "Nearest", "PairStats", "contrastive_koleo", "koleo_grad", "nearest",
    "pair_grad", "pair_stats", "gather_views",
]  # fmt: skip
