"""Recall@K, R-precision and MAP@R of a retrieval."""

from __future__ import annotations

from typing import Any, Optional, Sequence

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
    same: bool = False,
    own: Optional[Tensor] = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    gpus: int = 1,
) -> dict[str, Any]:
    """Metrics as fractions: `recall@K` for each distinct K, `map@r`, `r_precision`, and the counts `queries`, `gallery`, `unmatched`.

    query (Q, D), gallery (G, D) float32; labels (Q,), (G,) int64, not negative. same: query i is gallery row i, left out of its own
    neighbours. own: (Q,) int64, the gallery row that is left out of each query's neighbours, -1 for none.
    R is the number of gallery images of the query's class; queries with R = 0 are left out and counted as unmatched.
    Recall@K: share of queries with at least one of their class among the K nearest (Jegou et al. 2011 as used by the paper);
    R-precision and MAP@R: Musgrave et al. 2020, section 3.2. backend, device, gpus: see `search`. Raises UserError for empty
    sets, negative labels, a K below 1 or above what a query can be compared with, and where no query has a match.
    """
    own = torch.arange(len(query)) if same else own
    ks = sorted(set(ranks))
    _check(query, query_labels, gallery, gallery_labels, ks, own)
    classes = int(max(query_labels.max(), gallery_labels.max())) + 1
    relevant = torch.bincount(gallery_labels, minlength=classes)[query_labels]  # (Q,) R
    if own is not None:
        relevant = relevant - ((own >= 0) & (gallery_labels[own] == query_labels)).long()
    matched = relevant > 0
    if not matched.any():
        raise UserError("no query has an image of its class in the gallery")
    depth = max([*ks, int(relevant.max())])
    hits = {k: 0 for k in ks}
    precision = average = torch.zeros((), dtype=torch.float64)
    for first, _, indices in search(query, gallery, depth, exclude=own, backend=backend, device=device, gpus=gpus):
        rows = slice(first, first + indices.shape[0])
        keep = matched[rows]
        right = (gallery_labels[indices] == query_labels[rows, None])[keep]  # (C, depth)
        r = relevant[rows][keep]
        for k in ks:
            hits[k] += int(right[:, :k].any(dim=1).sum())
        place = torch.arange(1, depth + 1)
        within = right & (place <= r[:, None])
        precision = precision + (within.sum(dim=1).double() / r).sum()
        running = within.cumsum(dim=1).double() / place
        average = average + ((running * within).sum(dim=1) / r).sum()
    count = int(matched.sum())
    return {
        **{f"recall@{k}": hits[k] / count for k in ks},
        "map@r": float(average) / count,
        "r_precision": float(precision) / count,
        "queries": count,
        "gallery": gallery.shape[0],
        "unmatched": int((~matched).sum()),
    }


def _check(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int],
    own: Optional[Tensor],
) -> None:
    for name, vectors, labels in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        if len(vectors) == 0:
            raise UserError(f"the {name} set is empty: there is nothing to measure")
        if len(vectors) != len(labels):
            raise UserError(f"the {name} set has {len(vectors)} vectors and {len(labels)} labels: give one label each")
        if int(labels.min()) < 0:
            raise UserError(f"the {name} set has the label {int(labels.min())}: labels must not be negative")
    if ks and ks[0] < 1:
        raise UserError(f"--rank {ks[0]}: every K must be at least 1")
    excludes = own is not None and bool((own >= 0).any())
    reachable = len(gallery) - excludes
    if ks and ks[-1] > reachable:
        raise UserError(
            f"--rank {ks[-1]}: the gallery has only {reachable} images{' beside the query' if excludes else ''}: "
            f"use K of at most {reachable}"
        )
