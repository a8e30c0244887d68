"""Exact nearest neighbors by inner product, by FAISS or plain torch, on the GPU or the CPU."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Iterator, Optional

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

    Found rows of equal similarity come in the gallery's order. Similarities are those of the
    backend's matrix product, which may round identical rows differently; which of several such rows
    is found at the k-th place is open. `positive_ranks` is exact in both.

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
    if exclude_self:
        exclude = torch.arange(len(query))
    excludes = exclude is not None and bool((exclude >= 0).any())
    k = min(k, len(gallery) - excludes)
    wanted = k + excludes
    find = make_index(gallery, wanted, backend, device, gpus, "plain torch")
    find = TorchProduct(gallery, device) if find is None else find
    chunk = max(1, min(4096, CHUNK_VALUES // max(1, wanted)))
    for first in range(0, query.shape[0], chunk):
        part = query[first : first + chunk]
        try:
            found = find(part, wanted)
        except (RuntimeError, MemoryError) as error:
            if isinstance(find, TorchProduct):
                raise
            log.warning("FAISS failed during the search (%s): plain torch takes over", first_line(error))
            found = None
        if found is None:
            del find  # with its copy of the gallery: memory may be what FAISS lacked
            find = TorchProduct(gallery, device)
            found = find(part, wanted)
        similarities, indices = _by_row(*(tensor.cpu() for tensor in found))
        if excludes:
            similarities, indices = _move_to_end(exclude[first : first + chunk], similarities, indices)
        yield first, similarities[:, :k].clone(), indices[:, :k].clone()


def _by_row(similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by descending similarity, then by ascending index."""
    indices, order = indices.sort(dim=1)
    similarities, order = similarities.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarities, indices.gather(1, order)


def _move_to_end(excluded: Tensor, similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbors with each query's excluded row, if present, at the end."""
    order = (indices == excluded[:, None]).to(torch.uint8).argsort(dim=1, stable=True)
    return similarities.gather(1, order), indices.gather(1, order)


class TorchProduct:
    """Brute force: a product and topk, in chunks of queries."""

    def __init__(self, gallery: Tensor, device: torch.device) -> None:
        self.gallery, self.device = gallery.to(device), device

    def __call__(self, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with full_precision():
            chunks = part.split(max(1, CHUNK_VALUES // len(self.gallery)))
            found = [(some.to(self.device) @ self.gallery.T).topk(k, dim=1) for some in chunks]
        return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


class Faiss:
    """IndexFlatIP; takes CUDA tensors on a GPU; several GPUs each hold a part of the gallery."""

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
        self.index.add(gallery if self.on_gpu else gallery.cpu().numpy())

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
            return self.index.search(part.to(self.device), k)
        values, indices = self.index.search(part.cpu().contiguous().numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)


def make_index(
    gallery: Tensor, k: int, backend: str, device: torch.device, gpus: int, instead: str
) -> Optional[TorchProduct | Faiss]:
    """What finds k neighbors by `backend`; None where FAISS cannot, and the log says `instead`."""
    if backend == "torch":
        return TorchProduct(gallery, device)
    if device.type == "cuda" and k > FAISS_GPU_MAX_K:
        reason = f"k = {k} is above its limit of {FAISS_GPU_MAX_K} on a GPU"
    else:
        try:
            return Faiss(gallery, device, min(gpus, torch.cuda.device_count()) if device.type == "cuda" else 1)
        except (ImportError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
    log.log(logging.WARNING if backend == "faiss" else logging.INFO, "%s: FAISS cannot (%s)", instead, reason)
    return None


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products even if training allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
