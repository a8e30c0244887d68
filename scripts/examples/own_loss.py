"""A loss of your own: supervised contrastive (Khosla et al. 2020) over the batch and the memory.

fastirt train --objective scripts/examples/own_loss.py:supervised_contrastive …
"""

import torch

TEMPERATURE = 0.1


def supervised_contrastive(embeddings, labels, memory, memory_labels, memory_self):
    """embeddings (N, D) of unit length, labels (N,); memory (M, D) with labels (M,), -1 = empty,
    and each row's own slot (N,) or -1; all None in steps without a memory."""
    columns, column_labels = embeddings, labels
    own = torch.arange(len(labels), device=labels.device)[:, None]
    place = torch.arange(len(labels), device=labels.device)
    is_self = place == own
    if memory is not None:
        columns, column_labels = torch.cat([columns, memory.float()]), torch.cat([labels, memory_labels])
        slots = torch.arange(len(memory), device=labels.device)
        own_slot = slots == (torch.full_like(labels, -1) if memory_self is None else memory_self)[:, None]
        is_self = torch.cat([is_self, own_slot], 1)
    usable = ~is_self & (column_labels >= 0)
    logits = (embeddings @ columns.T / TEMPERATURE).masked_fill(~usable, -1e9)
    positive = usable & (labels[:, None] == column_labels)
    shares = (logits.log_softmax(1) * positive).sum(1) / positive.sum(1).clamp(min=1)
    return -shares.mean()
