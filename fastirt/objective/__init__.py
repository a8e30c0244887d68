"""The objective: contrastive loss over batch and memory, and KoLeo; on one rank and on many."""

from fastirt.objective.retrieval_loss import RetrievalLoss

__all__ = ["RetrievalLoss"]
