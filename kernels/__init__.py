"""The objective's mathematics, usable alone: contrastive loss over batch and memory, and KoLeo."""

from fastirt.kernels.reference import PAIR_THRESHOLD, ContrastiveKoLeo, contrastive_koleo, koleo, nearest, pair_loss

__all__ = ["PAIR_THRESHOLD", "ContrastiveKoLeo", "contrastive_koleo", "koleo", "nearest", "pair_loss"]
