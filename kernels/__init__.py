"""The objective as functions: contrastive loss over batch and memory, and KoLeo.

Each is there as Triton kernels, in tiles for a CPU, and in plain PyTorch. Nothing else of fastirt
is imported.
"""

from fastirt.kernels.contrastive import contrastive_koleo
from fastirt.kernels.gather import gather_views
from fastirt.kernels.reference import PAIR_THRESHOLD, REDUCTIONS, ContrastiveKoLeo
from fastirt.kernels.sharded import Nearest, PairStats, koleo_grad, nearest, pair_grad, pair_stats

__all__ = [
    "PAIR_THRESHOLD", "REDUCTIONS", "ContrastiveKoLeo", "Nearest", "PairStats", "contrastive_koleo", "gather_views",
    "koleo_grad", "nearest", "pair_grad", "pair_stats",
]  # fmt: skip
