"""The objective as functions, training views of images, and counts of similarities for ranks.

Each is there as Triton kernels, in tiles for a CPU, and in plain PyTorch. Nothing else of fastirt
is imported.
"""

from fastirt.kernels.contrastive import contrastive_koleo
from fastirt.kernels.counts.similarities import SimilarityCounts, count_similarities, similarity_error
from fastirt.kernels.gather import gather_views
from fastirt.kernels.reference import PAIR_THRESHOLD, REDUCTIONS, ContrastiveKoLeo
from fastirt.kernels.sharded import Nearest, PairStats, koleo_grad, nearest, pair_grad, pair_stats

__all__ = [
    "PAIR_THRESHOLD", "REDUCTIONS", "ContrastiveKoLeo", "Nearest", "PairStats", "SimilarityCounts", "contrastive_koleo",
    "count_similarities", "gather_views", "koleo_grad", "nearest", "pair_grad", "pair_stats", "similarity_error",
]  # fmt: skip
