"""How the rows ahead of each positive are counted: over the whole gallery, or among those found."""

from __future__ import annotations

import functools
import logging
from typing import Callable, Optional

import torch
from torch import Tensor

from fastirt.config.components import SEARCHES
from fastirt.errors import first_line
from fastirt.kernels import count_similarities, similarity_error
from fastirt.retrieval.counting import DENSE, GPU_TIMES, Block, add_ahead, count_ahead, counts, in_bounds, rounding
from fastirt.retrieval.positives import UNRANKED
from fastirt.retrieval.search import Faiss, TorchProduct, make_index

log = logging.getLogger("fastirt")

BLOCK, GPU_BLOCK, SEARCH_BLOCK = 512, 65536, 4096  # queries of a block
BLOCK_VALUES = 2**22  # positives of a block, or the neighbors that are found for it


class Counting:
    """Counts over the whole gallery, which is spread over the devices."""

    cuts = False

    def __init__(self, gallery: Tensor, device: torch.device, gpus: int) -> None:
        self.on_gpu = device.type == "cuda"
        gpus = min(gpus, torch.cuda.device_count()) if self.on_gpu else 1
        devices = [torch.device("cuda", i) for i in range(gpus)] if self.on_gpu and gpus > 1 else [device]
        self.parts, start = [], 0
        for rows, at in zip(gallery.tensor_split(len(devices)), devices):
            self.parts.append((start, rows.to(at)))
            start += len(rows)
        self.block, self.threads = (GPU_BLOCK, 1) if self.on_gpu else (BLOCK, torch.get_num_threads())
        self.values = BLOCK_VALUES if self.on_gpu else max(BLOCK, BLOCK_VALUES // (2 * self.threads))

    def rounding(self, dim: int) -> float:
        return similarity_error(dim) if self.on_gpu else rounding(dim)

    def __call__(self, block: Block) -> Tensor:
        return self._by_kernel(block) if self.on_gpu else self._by_tiles(block)

    def _by_tiles(self, block: Block) -> Tensor:
        ahead = torch.zeros_like(block.rows)
        for start, part in self.parts:
            ahead += count_ahead(block.to(part.device), part, start).to(ahead.device)
        return ahead

    def _by_kernel(self, block: Block) -> Tensor:
        counted = []
        for _, part in self.parts:  # all are launched before the first is waited for
            here = block.to(part.device)
            counted.append(count_similarities(here.query, part, here.low, here.high))
        above, within = (sum(counts[i].to(block.rows.device).long() for counts in counted) for i in range(2))
        # Each positive is within its own bounds; queries with other rows there are counted again.
        doubtful = (within != (block.rows >= 0)).any(dim=1).nonzero().flatten()
        for some in doubtful.split(GPU_TIMES * BLOCK):
            above[some] = self._by_tiles(block.select(some))
        return above


class Searching:
    """Counts among the nearest rows that a search finds; the rest is counted over all."""

    cuts = True  # ranks beyond what it finds are UNRANKED

    def __init__(self, find: Faiss | TorchProduct, gallery: Tensor, k: int, counting: Callable[[], Counting]) -> None:
        self.find: Optional[Faiss | TorchProduct] = find
        self.gallery, self.k, self.counting = gallery, k, counting
        self.block, self.threads = max(1, min(SEARCH_BLOCK, BLOCK_VALUES // k)), 1
        self.values = BLOCK_VALUES

    def rounding(self, dim: int) -> float:
        # What it leaves open may be counted by the kernel.
        return max(rounding(dim), similarity_error(dim))

    def __call__(self, block: Block) -> Tensor:
        if self.find is None:
            return self.counting()(block)
        try:
            values, columns = (found.to(block.rows.device) for found in self.find(block.query, self.k))
        except (RuntimeError, MemoryError) as error:
            if isinstance(self.find, TorchProduct):
                raise
            log.warning("FAISS failed during the search (%s): exact ranks take over", first_line(error))
            self.find = None
            return self.counting()(block)
        ahead, within = counts(values, block.low, block.high)
        valid = block.rows >= 0
        # Equal rows are many where embeddings have collapsed: too many to be compared pair by pair.
        uncounted = within.sum(dim=1) > valid.sum(dim=1) + DENSE
        for queries, places, found in in_bounds(values, block, torch.where(uncounted[:, None], 0, within)):
            add_ahead(ahead, block, queries, places, columns[queries, found], self.gallery)
        if self.k < len(self.gallery):
            last = values[:, -1:]
            ahead[block.high < last] = UNRANKED
            # Rows that were not found may be as similar as the last one that was.
            uncounted |= ((block.high >= last) & (block.low <= last) & valid).any(dim=1)
        if uncounted.any():
            ahead[uncounted] = self.counting()(block.select(uncounted.nonzero().flatten()))
        return ahead


def choose_backend(
    backend: str, gallery: Tensor, nearest: Optional[int], device: torch.device, gpus: int
) -> Counting | Searching:
    if backend not in SEARCHES:
        raise ValueError(f"backend {backend!r}: choose one of {', '.join(SEARCHES)}")
    counting = functools.cache(lambda: Counting(gallery, device, gpus))
    k = len(gallery) if nearest is None else min(nearest, len(gallery))
    if backend == "ranks" or (backend == "auto" and device.type != "cuda"):
        return counting()
    find = make_index(gallery, k, backend, device, gpus, "exact ranks by counting")
    return counting() if find is None else Searching(find, gallery, k, counting)
