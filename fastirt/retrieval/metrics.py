"""Recall@K, R-precision and MAP@R of a retrieval."""

from __future__ import annotations

from typing import Any, Sequence

import torch
from torch import Tensor

from fastirt.errors import UserError
from fastirt.retrieval.search import search


def retrieval_metrics(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ranks: Sequence[int],
    *,
    same: bool,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    gpus: int = 1,
) -> dict[str, Any]:
    """Metrics as fractions: `recall@K` for each K, `map@r`, `r_precision`, and the counts `queries`, `gallery`, `unmatched`.

    query (Q, D), gallery (G, D) float32; labels (Q,), (G,) int64. same: query i is gallery row i, left out of its own neighbours.
    R is the number of gallery pictures of the query's class; queries with R = 0 are left out and counted as unmatched.
    Recall@K: share of queries with at least one of their class among the K nearest (Jegou et al. 2011 as used by the paper);
    R-precision and MAP@R: Musgrave et al. 2020, section 3.2. backend, device, gpus: see `search`. Raises UserError for a K larger than the gallery.
    """
    reachable = gallery.shape[0] - (1 if same else 0)
    if max(ranks) > reachable:
        raise UserError(
            f"--rank {max(ranks)}: the gallery has only {reachable} pictures{' beside the query' if same else ''}: "
            f"use K of at most {reachable}"
        )
    classes = int(max(query_labels.max(), gallery_labels.max())) + 1
    relevant = torch.bincount(gallery_labels, minlength=classes)[query_labels] - (1 if same else 0)  # (Q,) R
    matched = relevant > 0
    if not matched.any():
        raise UserError("no query has a picture of its class in the gallery")
    depth = max(max(ranks), int(relevant.max()))
    hits = {k: 0 for k in ranks}
    precision = average = torch.zeros((), dtype=torch.float64)
    where = dict(backend=backend, device=device, gpus=gpus)
    for first, _, indices in search(query, gallery, depth, exclude_self=same, **where):
        rows = slice(first, first + indices.shape[0])
        keep = matched[rows]
        right = (gallery_labels[indices] == query_labels[rows, None])[keep]  # (C, depth)
        r = relevant[rows][keep]
        for k in ranks:
            hits[k] += int(right[:, :k].any(dim=1).sum())
        place = torch.arange(1, depth + 1)
        within = right & (place <= r[:, None])
        precision = precision + (within.sum(dim=1).double() / r).sum()
        running = within.cumsum(dim=1).double() / place
        average = average + ((running * within).sum(dim=1) / r).sum()
    count = int(matched.sum())
    return {
        **{f"recall@{k}": hits[k] / count for k in sorted(ranks)},
        "map@r": float(average) / count,
        "r_precision": float(precision) / count,
        "queries": count,
        "gallery": gallery.shape[0],
        "unmatched": int((~matched).sum()),
    }
