"""The rank of each positive: a count of the gallery rows that are more similar to the query.

Metrics of retrieval are functions of these ranks alone, so nothing is selected, sorted or stored.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.retrieval.positives import PositiveRanks, RowLists

PAIR_VALUES = 2**22  # float64 numbers of the pairs whose similarity is computed at once: 32 MiB


def pair_similarities(query: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The similarity of query rows[p] and gallery row columns[p], (P,) float32.

    It is the inner product, summed in float64 and then rounded to float32: this is the similarity
    by which ranks are defined. Identical gallery rows have identical similarities.
    """
    chunk = max(1, PAIR_VALUES // query.shape[1])
    parts = [
        (query[row].double() * gallery[column].double()).sum(dim=1).float()
        for row, column in zip(rows.split(chunk), columns.split(chunk))
    ]
    return torch.cat(parts) if parts else query.new_empty(0)


def reference_ranks(
    query: Tensor, gallery: Tensor, positives: RowLists, ignored: Optional[RowLists] = None
) -> PositiveRanks:
    """What `positive_ranks` computes, by sorting all similarities: for tests.

    A positive's rank is 1 + the number of gallery rows, ignored ones left out, that are more
    similar to the query, or equally similar and earlier in the gallery.
    """
    count, size = len(query), len(gallery)
    rows, columns = torch.arange(count).repeat_interleave(size), torch.arange(size).repeat(count)
    similarity = pair_similarities(query, gallery, rows, columns).view(count, size)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return PositiveRanks.of_rankings(order.tolist(), positives, ignored or RowLists.of_lists([[]] * count))
