"""Unit vectors to search, and the neighbours that a search finds."""

import torch
import torch.nn.functional as F

from fastirt.retrieval.search import search


def vectors(count: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def neighbors(query: torch.Tensor, gallery: torch.Tensor, k: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities and rows, (N, k), of all the parts in which a search yields them."""
    first, similarities, indices = zip(*search(query, gallery, k, **options))
    sizes = [len(rows) for rows in indices]
    assert list(first) == [sum(sizes[:number]) for number in range(len(sizes))]
    return torch.cat(similarities), torch.cat(indices)
