"""Exact nearest neighbours by inner product: FAISS on the GPU or the CPU, plain torch where FAISS cannot."""

from __future__ import annotations

import logging
from typing import Iterator, Optional

import torch
from torch import Tensor

log = logging.getLogger("fastirt")

FAISS_GPU_MAX_K = 2048
CHUNK_VALUES = 2**25  # similarities or neighbours held at once: 128 MiB in float32


def search(query: Tensor, gallery: Tensor, k: int, *, exclude_self: bool = False, backend: str = "auto",
           device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor, Tensor]]:
    """The k most similar gallery rows of each query, in chunks of queries, so that memory stays bounded.

    query (Q, D) and gallery (G, D): float32. Yields (first query of the chunk, similarities (C, k) float32, indices (C, k) int64), best
    first; equal similarities in the gallery's order, also at the k-th place. exclude_self: query i is gallery row i and no
    neighbour of itself. backend: `faiss`, `torch` or `auto` (FAISS where it can, said in the log where not).
    """
    device = torch.device(device)
    k = min(k, gallery.shape[0] - (1 if exclude_self else 0))
    wanted = k + (2 if exclude_self else 1)  # itself, and one more to see a tie at the k-th place
    find = _backend(gallery, min(wanted, gallery.shape[0]), backend, device)
    chunk = max(1, min(4096, CHUNK_VALUES // max(wanted, gallery.shape[0] if find.dense else wanted)))
    for first in range(0, query.shape[0], chunk):
        part = query[first:first + chunk]
        own = torch.arange(first, first + part.shape[0]) if exclude_self else None
        similarities, indices = find(part, min(wanted, gallery.shape[0]))
        yield first, *_settle(part, gallery, similarities, indices, k, own)


def _settle(part: Tensor, gallery: Tensor, similarities: Tensor, indices: Tensor, k: int, own: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Order ties by gallery row, take each query's own row out, and redo the rows whose k-th place is tied with what was not returned."""
    undecided = torch.zeros(part.shape[0], dtype=torch.bool)
    if indices.shape[1] < gallery.shape[0]:
        undecided = similarities[:, -2] == similarities[:, -1]  # the k-th place (the own row counted) and the one after it
    similarities, indices = _sorted(similarities, indices)
    if own is not None:
        similarities = similarities.masked_fill(indices == own[:, None], float("-inf"))
        similarities, order = similarities.sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
    similarities, indices = similarities[:, :k].clone(), indices[:, :k].clone()
    for row in undecided.nonzero().flatten().tolist():  # rare: many exact duplicates
        values = gallery @ part[row]
        if own is not None:
            values[own[row]] = float("-inf")
        values, order = values.sort(descending=True, stable=True)
        similarities[row], indices[row] = values[:k], order[:k]
    return similarities, indices


def _sorted(similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """By falling similarity, then by rising index."""
    order = indices.argsort(dim=1)
    similarities, indices = similarities.gather(1, order), indices.gather(1, order)
    order = similarities.argsort(dim=1, descending=True, stable=True)
    return similarities.gather(1, order), indices.gather(1, order)


class _Torch:
    """Brute force: a chunk of queries against the whole gallery."""

    dense = True

    def __init__(self, gallery: Tensor, device: torch.device) -> None:
        self.gallery, self.device = gallery.to(device), device

    def __call__(self, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = (part.to(self.device) @ self.gallery.T).topk(k, dim=1)
        return values.cpu(), indices.cpu()


class _Faiss:
    """IndexFlatIP; on a GPU it is fed with CUDA tensors."""

    dense = False

    def __init__(self, gallery: Tensor, device: torch.device) -> None:
        import faiss

        self.device = device
        faiss.omp_set_num_threads(torch.get_num_threads())
        if device.type == "cuda":
            import faiss.contrib.torch_utils  # noqa: F401  teaches the index to take tensors

            self.resources, settings = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
            settings.device = device.index or 0
            self.index = faiss.GpuIndexFlatIP(self.resources, gallery.shape[1], settings)
            self.index.add(gallery.to(device))
        else:
            self.index = faiss.IndexFlatIP(gallery.shape[1])
            self.index.add(gallery.numpy())

    def __call__(self, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.device.type == "cuda":
            values, indices = self.index.search(part.to(self.device), k)
            return values.cpu(), indices.cpu()
        values, indices = self.index.search(part.numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)


def _backend(gallery: Tensor, k: int, backend: str, device: torch.device) -> _Torch | _Faiss:
    if backend == "torch":
        return _Torch(gallery, device)
    reason = ""
    if device.type == "cuda" and k > FAISS_GPU_MAX_K:
        reason = f"k = {k} is above FAISS's limit of {FAISS_GPU_MAX_K} on a GPU"
    else:
        try:
            return _Faiss(gallery, device)
        except (ImportError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    log.info("search by plain torch: FAISS cannot (%s)", reason)
    return _Torch(gallery, device)
