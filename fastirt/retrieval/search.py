"""Exact nearest neighbors by inner product, by FAISS or plain torch, on the GPU or the CPU."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Iterator, Optional

import numpy as np
import torch
from torch import Tensor

from fastirt.errors import first_line

log = logging.getLogger("fastirt")

FAISS_GPU_MAX_K = 2048
CHUNK_VALUES = 2**23  # similarities or neighbors held at once: 32 MiB in float32


def search(
    query: Tensor,
    gallery: Tensor,
    k: int,
    *,
    exclude_self: bool = False,
    exclude: Optional[Tensor] = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    gpus: int = 1,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The k most similar gallery rows of each query, in chunks of queries to bound memory.

    Rows of equal similarity come in the gallery's order, also at the k-th place. Identical gallery
    rows always have equal similarities; otherwise similarities are those of the backend's matrix
    product.

    Args:
        query: (Q, D) float32, finite.
        gallery: (G, D) float32, finite.
        k: neighbors per query; at most G are returned, or G - 1 if rows are excluded.
        exclude_self: query i is gallery row i, which is excluded from its own neighbors.
        exclude: (Q,) int64, the gallery row excluded from each query's neighbors, -1 for none.
        backend: "faiss", "torch", or "auto" for FAISS with a fallback to torch, which is logged.
        device: where to search.
        gpus: number of this machine's GPUs over which FAISS spreads the gallery.

    Yields:
        (first query of the chunk, similarities (C, k) float32, indices (C, k) int64), on the CPU,
        best first.
    """
    device = torch.device(device)
    gpus = min(gpus, torch.cuda.device_count()) if device.type == "cuda" else 1
    rows = gallery.shape[0]
    if exclude_self:
        exclude = torch.arange(len(query))
    excludes = exclude is not None and bool((exclude >= 0).any())
    k = min(k, rows - excludes)
    # The excluded row, and one more to detect a tie at the k-th place.
    wanted = min(k + (2 if excludes else 1), rows)
    distinct = Distinct(gallery)
    depth = min(wanted, len(distinct.vectors))
    find = _backend(distinct.vectors, depth, backend, device, gpus)
    redo: Optional[_Torch] = None
    chunk = max(1, min(4096, CHUNK_VALUES // (rows if find.dense else wanted)))
    for first in range(0, query.shape[0], chunk):
        part = query[first : first + chunk]
        excluded = exclude[first : first + chunk] if excludes else None
        failure = ""
        try:
            nearest = find(part, depth)
        except (RuntimeError, MemoryError) as error:
            if isinstance(find, _Torch):
                raise
            failure = first_line(error)
        if failure:
            log.warning("FAISS failed during the search (%s): plain torch takes over", failure)
            del find  # with its copy of the gallery: memory may be what FAISS lacked
            find = _Torch(distinct.vectors, device)
            nearest = find(part, depth)
        similarities, indices = distinct.expand(*nearest, wanted)
        similarities, indices = _by_row(similarities, indices)
        tied = similarities[:, -2:-1] == similarities[:, -1:]
        undecided = tied.flatten().nonzero().flatten() if wanted < rows else tied.new_empty(0, dtype=torch.int64)
        if excluded is not None:
            similarities, indices = _move_to_end(excluded, similarities, indices)
        similarities, indices = similarities[:, :k].clone(), indices[:, :k].clone()
        # A tie at the k-th place may extend beyond the candidates: search the whole gallery.
        if len(undecided):
            redo = redo or (find if isinstance(find, _Torch) else _Torch(distinct.vectors, device))
            for some in undecided.split(max(1, CHUNK_VALUES // rows)):
                values = distinct.spread(redo.all(part[some]))
                similarities[some], indices[some] = _top(values, k, None if excluded is None else excluded[some])
        yield first, similarities, indices


class Distinct:
    """The distinct rows of a gallery, the only ones that are searched.

    A matrix product may round two identical rows differently, depending on their position (5 % of
    the pairs in FAISS's CPU index, D = 384), which would decide ties.
    """

    def __init__(self, gallery: Tensor) -> None:
        data = np.ascontiguousarray(gallery.cpu().numpy())
        keys = data.view(np.dtype((np.void, data.itemsize * data.shape[1]))).ravel()
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        self.has_copies = len(first) < len(data)
        self.vectors = gallery[torch.from_numpy(first)] if self.has_copies else gallery  # (U, D)
        self.group = torch.from_numpy(group.ravel())  # (G,) row of `vectors`
        self.rows = self.group.argsort(stable=True)  # gallery rows, group by group
        self.counts = torch.bincount(self.group)
        self.starts = self.counts.cumsum(0) - self.counts

    def expand(self, similarities: Tensor, groups: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """(C, K) neighbors among `vectors` to the first `wanted` gallery rows, (C, wanted)."""
        if not self.has_copies:
            return similarities, groups
        counts = self.counts[groups]
        ends = counts.cumsum(1)
        place = torch.arange(wanted).expand(len(groups), wanted).contiguous()
        at = torch.searchsorted(ends, place, right=True)  # the group of each place
        member = place - (ends - counts).gather(1, at)
        return similarities.gather(1, at), self.rows[self.starts[groups.gather(1, at)] + member]

    def spread(self, values: Tensor) -> Tensor:
        """(C, U) similarities to (C, G)."""
        return values[:, self.group.to(values.device)] if self.has_copies else values


def _by_row(similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by descending similarity, then by ascending index."""
    indices, order = indices.sort(dim=1)
    similarities, order = similarities.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarities, indices.gather(1, order)


def _move_to_end(excluded: Tensor, similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbors with each query's excluded row, if present, at the end."""
    order = (indices == excluded[:, None]).to(torch.uint8).argsort(dim=1, stable=True)
    return similarities.gather(1, order), indices.gather(1, order)


def _top(values: Tensor, k: int, excluded: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """The first k of (C, G) similarities, by descending similarity, then by ascending row."""
    if excluded is not None:
        queries = (excluded >= 0).nonzero().flatten()
        values[queries, excluded[queries]] = float("-inf")
    last = values.topk(k, dim=1).values[:, -1:]
    above, tied = values > last, values == last
    chosen = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    indices = chosen.nonzero()[:, 1].view(-1, k)  # ascending
    similarities, order = values.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return similarities.cpu(), indices.gather(1, order).cpu()


class _Torch:
    """Brute force: a chunk of queries against the whole gallery."""

    dense = True

    def __init__(self, gallery: Tensor, device: torch.device) -> None:
        self.gallery, self.device = gallery.to(device), device

    def all(self, part: Tensor) -> Tensor:
        with _full_precision():
            return part.to(self.device) @ self.gallery.T

    def __call__(self, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # In pieces, because chunks for FAISS are larger than those that fit here.
        pieces = [self.all(some).topk(k, dim=1) for some in part.split(max(1, CHUNK_VALUES // len(self.gallery)))]
        return torch.cat([piece.values for piece in pieces]).cpu(), torch.cat([piece.indices for piece in pieces]).cpu()


class _Faiss:
    """IndexFlatIP; takes CUDA tensors on a GPU; several GPUs each hold a part of the gallery."""

    dense = False

    def __init__(self, gallery: Tensor, device: torch.device, parts: int = 1) -> None:
        import faiss

        self.on_gpu = device.type == "cuda" and parts == 1
        self.device = device
        faiss.omp_set_num_threads(torch.get_num_threads())
        gallery = gallery.contiguous()
        if self.on_gpu:
            import faiss.contrib.torch_utils  # noqa: F401  lets the index take tensors

            gallery = gallery.to(device)
        places = [torch.device(device.type, i) for i in range(parts)] if parts > 1 else [device]
        self._owned = [self._flat(faiss, place, gallery.shape[1]) for place in places]
        self.index: Any = self._owned[0][0]
        if parts > 1:
            # Threaded, with consecutive row numbers; faiss's annotations lack these arguments.
            self.index = faiss.IndexShards(gallery.shape[1], True, True)  # type: ignore[call-arg]
            for index, _ in self._owned:
                self.index.add_shard(index)
        self.index.add(gallery if self.on_gpu else gallery.numpy())

    @staticmethod
    def _flat(faiss: Any, place: torch.device, dim: int) -> tuple[Any, Any]:
        """(index, resources that must outlive it)."""
        if place.type != "cuda":
            return faiss.IndexFlatIP(dim), None
        resources, settings = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
        settings.device = place.index or 0
        return faiss.GpuIndexFlatIP(resources, dim, settings), resources

    def __call__(self, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.on_gpu:
            values, indices = self.index.search(part.to(self.device), k)
            return values.cpu(), indices.cpu()
        values, indices = self.index.search(part.contiguous().numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)


def _backend(gallery: Tensor, k: int, backend: str, device: torch.device, gpus: int = 1) -> _Torch | _Faiss:
    if backend == "torch":
        return _Torch(gallery, device)
    if device.type == "cuda" and k > FAISS_GPU_MAX_K:
        reason = f"k = {k} is above its limit of {FAISS_GPU_MAX_K} on a GPU"
    else:
        try:
            return _Faiss(gallery, device, gpus)
        except (ImportError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
    log.log(logging.WARNING if backend == "faiss" else logging.INFO, "search by plain torch: FAISS cannot (%s)", reason)
    return _Torch(gallery, device)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products even if training allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
