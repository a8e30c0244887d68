"""Exact nearest neighbors in float32 vectors that lie in memory-mapped files, or on a GPU.

On a CPU every block of rows is read once, by as many threads as torch has. Single queries run near
the rate at which memory can be read: numpy's inner products, row by row, are faster than the
matrix-vector products of MKL and OpenBLAS (benchmarks/parts/gallery.py).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Optional, Sequence

import numpy as np
import torch

from fastirt.retrieval.search import full_precision

FEW = 4  # up to this many queries, less one, inner products are faster than a matrix product
BLOCK_FEW, BLOCK_LEAST, BLOCK = 65536, 4096, 16384  # rows read at once
QUERIES = 256  # at once, to bound memory
GPU_VALUES = 2**28  # similarities at once on a GPU: 1 GiB
SUBSET = 8  # a filter that leaves less than one row in 8 has its rows gathered

Hits = tuple[np.ndarray, np.ndarray]  # similarities (Q, k) float32, rows (Q, k) int64, best first


def best(similarities: np.ndarray, rows: np.ndarray, k: int) -> Hits:
    """The k best of (Q, C) candidates: by descending similarity, then by ascending row."""
    order = np.lexsort((rows, -similarities), axis=1)[:, :k]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)


@lru_cache(maxsize=1)
def threads(process: int, count: int) -> ThreadPoolExecutor:
    """Shared by all galleries of a process; a forked one has none of its parent's threads."""
    return ThreadPoolExecutor(count)


class Exact:
    """Searches vectors in several arrays, whose rows are numbered through."""

    def __init__(self, parts: Sequence[np.ndarray], device: str | torch.device = "cpu") -> None:
        """parts: (N_i, D) float32 each, rows of unit length."""
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.on_gpu = self._to_gpu(torch.device(device))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _to_gpu(self, device: torch.device) -> Optional[torch.Tensor]:
        """All vectors on the GPU; None if that is no GPU or lacks the memory."""
        if device.type != "cuda" or not len(self):
            return None
        needed = sum(part.nbytes for part in self.parts)
        if needed > 0.8 * torch.cuda.mem_get_info(device)[0]:
            return None
        vectors = torch.empty((len(self), self.parts[0].shape[1]), device=device)
        for part, start in zip(self.parts, self.starts.tolist()):
            for first in range(0, len(part), BLOCK_FEW):
                rows = torch.from_numpy(np.array(part[first : first + BLOCK_FEW]))
                vectors[start + first : start + first + len(rows)] = rows.to(device)
        return vectors

    def search(self, queries: np.ndarray, k: int, keep: Optional[np.ndarray] = None) -> Hits:
        """The k nearest rows of each query, fewer where fewer are kept; equal ones in row order.

        Which of several rows of equal similarity is found at the k-th place is open.

        Args:
            queries: (Q, D) float32, finite.
            k: neighbors per query.
            keep: (N,) bool, the rows that may be found; None for all.
        """
        kept = len(self) if keep is None else int(np.count_nonzero(keep))
        k = min(k, kept)
        if k == 0 or not len(queries):
            return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        if keep is not None and kept * SUBSET < len(self) and self.on_gpu is None:
            rows = np.flatnonzero(keep)
            similarities, found = Exact([self.vectors(rows)]).search(queries, k)
            return similarities, rows[found]
        together = QUERIES if self.on_gpu is None else max(1, min(QUERIES, GPU_VALUES // len(self)))
        chunks = [queries[first : first + together] for first in range(0, len(queries), together)]
        find = self._on_cpu if self.on_gpu is None else self._on_gpu
        found = [find(chunk, k, keep) for chunk in chunks]
        return np.concatenate([hits[0] for hits in found]), np.concatenate([hits[1] for hits in found])

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """(R, D) float32: the vectors of ascending row numbers."""
        cuts = np.searchsorted(rows, self.starts)
        return np.concatenate(
            [part[rows[a:b] - start] for part, start, a, b in zip(self.parts, self.starts, cuts, cuts[1:])]
        )

    def _on_cpu(self, queries: np.ndarray, k: int, keep: Optional[np.ndarray]) -> Hits:
        few = len(queries) < FEW
        workers = torch.get_num_threads()
        size = min(BLOCK_FEW, max(BLOCK_LEAST, len(self) // (4 * workers))) if few else BLOCK
        blocks = [
            (part[first : first + size], start + first)
            for part, start in zip(self.parts, self.starts.tolist())
            for first in range(0, len(part), size)
        ]

        def top(block: tuple[np.ndarray, int]) -> Hits:
            vectors, start = block
            scores = np.vecdot(vectors, queries[:, None]) if few else queries @ vectors.T
            if keep is not None:
                scores[:, ~keep[start : start + len(vectors)]] = -np.inf
            found = torch.from_numpy(scores).topk(min(k, len(vectors)), dim=1)
            return found.values.numpy(), found.indices.numpy() + start

        hits = list((threads(os.getpid(), workers).map if len(blocks) > 1 else map)(top, blocks))
        return best(np.concatenate([hit[0] for hit in hits], 1), np.concatenate([hit[1] for hit in hits], 1), k)

    def _on_gpu(self, queries: np.ndarray, k: int, keep: Optional[np.ndarray]) -> Hits:
        assert self.on_gpu is not None
        with full_precision():
            scores = torch.from_numpy(np.ascontiguousarray(queries)).to(self.on_gpu.device) @ self.on_gpu.T
        if keep is not None:
            scores[:, torch.from_numpy(~keep).to(scores.device)] = -torch.inf
        found = scores.topk(k, dim=1)
        return best(found.values.cpu().numpy(), found.indices.cpu().numpy(), k)
