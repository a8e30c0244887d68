"""Approximate search by any index of FAISS's factory, e.g. "HNSW32" or "IVF4096,PQ32".

What the index finds is sorted again by the exact similarities, which lie beside it. Rows that are
removed or filtered out are left out there, so every kind of index can be filtered.
"""

from __future__ import annotations

import logging
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from fastirt.errors import UserError
from fastirt.gallery.exact import SUBSET, Exact, Hits, best

log = logging.getLogger("fastirt")

RERANK = 4  # the index is asked for this many times k rows
MIN_PER_LIST = 39  # vectors for each list, below which FAISS warns of poor clusters
SAMPLE, SAMPLE_K = 256, 10  # queries and neighbors of the measured recall
MAX_NUMBER = 2**24
FAISS_ERRORS = (RuntimeError, MemoryError, AssertionError, ValueError, OverflowError, TypeError)


class Quality(NamedTuple):
    """An index beside exact search."""

    recall: float  # share of the k exact neighbors that it finds
    k: int
    queries: int  # vectors of the gallery, each without itself
    bytes_per_vector: float
    ms: float  # a query, one at a time
    exact_ms: float


class FactoryIndex:
    """An index of all rows of `exact`, in the same order."""

    def __init__(self, index: Any, exact: Exact) -> None:
        self.index, self.exact = index, exact

    @classmethod
    def build(cls, kind: str, params: str, exact: Exact) -> FactoryIndex:
        """Train an index on the vectors and add them.

        kind: a factory string. params: as `faiss.ParameterSpace` takes them, e.g. "nprobe=16".

        Raises UserError for a malformed string, wrong parameters, or too few vectors.
        """
        import faiss

        vectors = exact.parts[0] if len(exact.parts) == 1 else np.concatenate(exact.parts)
        vectors = np.asarray(vectors)  # faiss.contrib.torch_utils, once imported, takes no memory map
        count, dim = vectors.shape
        index = make_index(kind, dim, count)
        if (ivf := _ivf(faiss, index)) and count < MIN_PER_LIST * ivf.nlist:
            log.warning("--kind '%s': %s vectors are few for %s lists", kind, f"{count:,}", f"{ivf.nlist:,}")
        _quiet_clustering(faiss, index)
        try:
            index.train(vectors)
            index.add(vectors)
        except FAISS_ERRORS as error:
            raise UserError(f"--kind '{kind}': cannot be trained on {count:,} vectors ({_reason(error)})")
        _set_params(faiss, index, params or _default_params(faiss, index))
        return cls(index, exact)

    @classmethod
    def read(cls, file: Path, exact: Exact) -> FactoryIndex:
        import faiss

        try:
            index: Any = faiss.read_index(str(file))
        except FAISS_ERRORS as error:
            raise UserError(f"{file}: FAISS cannot read it ({_reason(error)}): run fastirt index again")
        if index.ntotal != len(exact):
            raise UserError(f"{file}: {index.ntotal:,} vectors in place of {len(exact):,}: run fastirt index again")
        return cls(index, exact)

    def write(self, file: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(file))

    def add(self, vectors: np.ndarray) -> None:
        """Add the last rows of the gallery, without training again."""
        try:
            self.index.add(np.ascontiguousarray(vectors, np.float32))
        except FAISS_ERRORS as error:
            raise UserError(f"its index takes no further vectors ({_reason(error)}): run fastirt index on all images")

    def search(self, queries: np.ndarray, k: int, keep: Optional[np.ndarray] = None) -> Hits:
        """As `Exact.search`, but approximate; exact for a query that finds fewer than k."""
        count = len(self.exact)
        kept = count if keep is None else int(np.count_nonzero(keep))
        k = min(k, kept)
        if k == 0 or kept * SUBSET < count:
            return self.exact.search(queries, k, keep)
        wanted = min(count, math.ceil(RERANK * k * count / kept))
        rows = self.index.search(np.ascontiguousarray(queries, np.float32), wanted)[1]
        valid = rows >= 0 if keep is None else (rows >= 0) & keep[rows]
        distinct, places = np.unique(rows.clip(0), return_inverse=True)
        vectors = self.exact.vectors(distinct)
        places = places.reshape(rows.shape)
        similarities = np.stack([vectors[place] @ query for place, query in zip(places, queries)])
        similarities, rows = best(np.where(valid, similarities, -np.inf), rows, k)
        short = ~np.isfinite(similarities[:, -1])
        if short.any():
            similarities[short], rows[short] = self.exact.search(queries[short], k, keep)
        return similarities, rows

    def measure(self, file: Path) -> Quality:
        """Recall against exact search for a sample of the gallery's own vectors."""
        count = len(self.exact)
        sample = np.sort(np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False))
        queries, k = self.exact.vectors(sample), min(SAMPLE_K, count - 1)
        lists = []
        for search in (self.search, self.exact.search):
            found = search(queries, k + 1)[1]
            lists.append([row[row != own][:k] for row, own in zip(found, sample)])
        shared = sum(len(np.intersect1d(a, b)) for a, b in zip(*lists))
        recall = shared / (k * len(sample)) if k else 1.0
        times = [_median_ms(search, queries[:20], k) for search in (self.search, self.exact.search)]
        return Quality(recall, k, len(sample), file.stat().st_size / max(1, count), *times)


def _median_ms(search: Any, queries: np.ndarray, k: int) -> float:
    times = []
    for query in queries:
        start = time.perf_counter()
        search(query[None], k)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def make_index(kind: str, dim: int, count: int) -> Any:
    """An empty index for `count` vectors.

    Raises UserError for a malformed string, one that does not fit `dim`, and too few vectors.
    """
    import faiss

    for number in re.findall(r"\d+", kind):  # with 0 FAISS ends the process
        if not 0 < int(number) <= MAX_NUMBER:
            raise UserError(f"--kind '{kind}': the number {number} is no size of a FAISS index")
    if graph := re.search(r"(HNSW|NSG)1(?!\d)", kind):  # HNSW1 ends the process, NSG1 never ends
        raise UserError(f"--kind '{kind}': {graph[0]} has one link a vector: give it 2 or more")
    try:
        index: Any = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    except FAISS_ERRORS as error:
        raise UserError(f"--kind '{kind}': no FAISS index of {dim} dimensions ({_reason(error)})")
    if (ivf := _ivf(faiss, index)) and count < ivf.nlist:
        raise UserError(
            f"--kind '{kind}': its {ivf.nlist:,} lists need at least as many vectors, and better "
            f"{MIN_PER_LIST * ivf.nlist:,}; there are {count:,}"
        )
    return index


def _reason(error: BaseException) -> str:
    """The message of a FAISS error without the C++ function and file in which it arose."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^Error in .*? at \S+?:\d+: ", "", text)
    return re.sub(r"^Error: '.*?' failed:?\s*", "", text)[:200] or "FAISS gives no reason"


def _ivf(faiss: Any, index: Any) -> Any:
    """The inverted lists in the index, or None."""
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None


def _quiet_clustering(faiss: Any, index: Any) -> None:
    """FAISS prints a line for each of its clusterings that has few vectors: none, at all depths."""
    index = faiss.downcast_index(index)
    for clusters in (index, getattr(index, "pq", None)):
        if hasattr(clusters, "cp"):
            clusters.cp.min_points_per_centroid = 1
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False  # takes most of the training, and no search here uses it
    for name in ("index", "base_index", "storage"):
        if inner := getattr(index, name, None):
            _quiet_clustering(faiss, inner)


def _default_params(faiss: Any, index: Any) -> str:
    """FAISS looks into one list, which finds little."""
    ivf = _ivf(faiss, index)
    return "" if ivf is None else f"nprobe={min(ivf.nlist, max(8, ivf.nlist // 64))}"


def _set_params(faiss: Any, index: Any, params: str) -> None:
    if not params:
        return
    try:
        faiss.ParameterSpace().set_index_parameters(index, params)
    except FAISS_ERRORS as error:
        raise UserError(f"--params '{params}': {_reason(error)}")
