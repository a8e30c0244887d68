"""Recall@K, R-precision and MAP@R."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from fastirt.config.validate import check_ks
from fastirt.errors import UserError
from fastirt.retrieval.search import search


def retrieval_metrics(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ranks: Sequence[int],
    *,
    exclude_self: bool = False,
    exclude: Optional[Tensor] = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    gpus: int = 1,
    same: bool = False,
    own: Optional[Tensor] = None,
) -> dict[str, Any]:
    """Search the gallery for each query and measure the result.

    R is the number of gallery images of the query's class. Queries with R = 0 are not counted.
    Recall@K is the share of queries with an image of their class among the K nearest (Jegou et al.
    2011, as used by the paper). R-precision and MAP@R: Musgrave et al. 2020, section 3.2.

    Args:
        query: (Q, D) float32.
        query_labels: (Q,) int64, not negative.
        gallery: (G, D) float32.
        gallery_labels: (G,) int64, not negative.
        ranks: the K of Recall@K.
        exclude_self: query i is gallery row i, which is excluded from its own neighbors.
        exclude: (Q,) int64, the gallery row excluded from each query's neighbors, -1 for none.
        backend: as in `search`.
        device: as in `search`.
        gpus: as in `search`.
        same: old name of `exclude_self`.
        own: old name of `exclude`.

    Returns:
        `recall@K` for each distinct K, `map@r` and `r_precision` as fractions, and the counts
        `queries` (with a match), `gallery` and `unmatched`.

    Raises:
        UserError: an empty set, a negative label, a K below 1 or above the number of gallery images
            that a query is compared with, or no query with a match.
    """
    exclude = own if exclude is None else exclude
    if exclude_self or same:
        exclude = torch.arange(len(query))
    ks = sorted(set(ranks))
    _check(query, query_labels, gallery, gallery_labels)
    excludes = exclude is not None and bool((exclude >= 0).any())
    check_ks(ks, len(gallery) - excludes, beside_query=excludes)
    classes = int(max(query_labels.max(), gallery_labels.max())) + 1
    relevant = torch.bincount(gallery_labels, minlength=classes)[query_labels]  # (Q,) R
    if exclude is not None:
        relevant = relevant - ((exclude >= 0) & (gallery_labels[exclude] == query_labels)).long()
    matched = relevant > 0
    if not matched.any():
        raise UserError("no query has an image of its class in the gallery")
    depth = max([*ks, int(relevant.max())])
    hits = {k: 0 for k in ks}
    precision = average = torch.zeros((), dtype=torch.float64)
    for first, _, indices in search(query, gallery, depth, exclude=exclude, backend=backend, device=device, gpus=gpus):
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


def _check(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> None:
    for name, vectors, labels in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        if len(vectors) == 0:
            raise UserError(f"the {name} set is empty: there is nothing to measure")
        if len(vectors) != len(labels):
            raise UserError(f"the {name} set has {len(vectors)} vectors and {len(labels)} labels: pass one label each")
        if int(labels.min()) < 0:
            raise UserError(f"the {name} set has the label {int(labels.min())}: labels must not be negative")
