"""Search in a gallery on disk: its memory-mapped vectors beside FAISS and plain torch."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from benchmarks.results import Results, figure_of
from benchmarks.rounds import run_interleaved
from fastirt.gallery import Gallery

READ = "read of all vectors"
CENTERS, NOISE = 1000, 2.0  # vectors are as those of parts/retrieval.py
BLOCK = 50_000  # rows made at once


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vectors", type=int, nargs="+", help="sizes of galleries (default: 10^4, 10^5 and 10^6)")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64], help="at once (default: 1 64)")
    parser.add_argument("--dim", type=int, default=384, help="D, length of a vector (default: %(default)s)")
    parser.add_argument("--k", type=int, default=10, help="neighbors (default: %(default)s)")
    parser.add_argument("--kinds", nargs="*", default=["HNSW32"], help="FAISS indexes (default: %(default)s)")
    parser.add_argument("--most", type=int, default=10_000, help="vectors for an index (default: %(default)s)")


def run(args: argparse.Namespace, results: Results) -> None:
    for count in args.vectors or ([2000] if args.quick else [10**4, 10**5, 10**6]):
        with tempfile.TemporaryDirectory() as folder:
            _measure(Path(folder), count, args, results)


def vectors(count: int, dim: int) -> np.ndarray:
    """(count, dim) float32 of unit length, around centers."""
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((CENTERS, dim), dtype=np.float32)
    made = np.empty((count, dim), np.float32)
    for first in range(0, count, BLOCK):
        part = made[first : first + BLOCK]
        part[:] = centers[draw.integers(CENTERS, size=len(part))] + NOISE * draw.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return made


def _measure(folder: Path, count: int, args: argparse.Namespace, results: Results) -> None:
    made = vectors(count + max(args.queries), args.dim)
    rows, queries = made[:count], made[count:]
    paths = [f"class{i % 1000:03}/{i}.jpg" for i in range(count)]
    metadata = {"brand": [f"brand {i % 50}" for i in range(count)]}
    params = {"vectors": count, "D": args.dim}
    kinds = args.kinds if count <= args.most else []
    read = min(_seconds(torch.from_numpy(rows).sum) for _ in range(5))
    sizes = dict(part="gallery", unit="s", params=params, better="lower", limit=read, limit_name=READ)
    for kind in [None, *kinds]:
        start = time.perf_counter()
        Gallery.from_vectors(rows, paths, folder / str(kind), metadata=metadata, kind=kind)
        seconds = time.perf_counter() - start
        results.add(figure_of([seconds], name=f"build {kind or 'exact'}", **sizes))
    for verify in (False, True):
        times = [_seconds(partial(Gallery.open, folder / "None", device="cpu", verify=verify)) for _ in range(3)]
        results.add(figure_of(times, name="open and verify" if verify else "open", **sizes))
    galleries = {str(kind): Gallery.open(folder / str(kind), device=str(results.device)) for kind in [None, *kinds]}
    mapped = torch.from_numpy(np.load(folder / "None" / "vectors-1.npy", mmap_mode="r"))
    for together in args.queries:
        calls = contenders(galleries, mapped, rows, queries[:together], args.k)
        large = together * count > 10**7
        repeats = args.repeats or (3 if args.quick or large else 10)
        # A turn has several searches: idle threads of the library before it slow the first.
        timed = run_interleaved(calls, results.device, repeats, steps=1 if large else 8, warm_up=1)
        _report(timed, {**params, "queries": together, "k": args.k}, galleries, results)


def contenders(
    galleries: dict[str, Gallery], mapped: torch.Tensor, rows: np.ndarray, queries: np.ndarray, k: int
) -> dict[str, Callable[[], Any]]:
    """By name, a search for all queries. mapped: the vectors on disk, rows: the same in memory."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    flat: Any = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    wanted, in_memory = torch.from_numpy(queries), torch.from_numpy(rows)
    calls: dict[str, Callable[[], Any]] = {
        READ: mapped.sum,
        "fastirt": lambda: galleries["None"].search_vectors(queries, k),
        "fastirt, one brand": lambda: galleries["None"].search_vectors(queries, k, "brand=brand 7"),
        "FAISS IndexFlatIP": lambda: flat.search(queries, k),
        "torch product + topk": lambda: (wanted @ in_memory.T).topk(k),
        "numpy product + topk": lambda: torch.from_numpy(queries @ rows.T).topk(k),
    }
    for kind, gallery in galleries.items():
        if kind != "None":
            calls[f"fastirt {kind}"] = partial(gallery.search_vectors, queries, k)
    return calls


def _report(timed: dict[str, Any], params: dict[str, Any], galleries: dict[str, Gallery], results: Results) -> None:
    """Milliseconds a query, beside the time to read all vectors once, or to multiply them."""
    read, queries = 1e3 * statistics.median(timed[READ].seconds), params["queries"]
    product = 2 * params["vectors"] * params["D"] / (1e9 * results.limits["fp32"])
    limit, limit_name = max((read / queries, READ), (product, "fp32 products"))
    for name, rounds in timed.items():
        if isinstance(rounds, str):
            results.not_run("gallery", name, rounds)
            continue
        values = [1e3 * seconds for seconds in rounds.seconds]
        if name == READ and queries > 1:
            continue
        quality = galleries[name.removeprefix("fastirt ")].index if name.removeprefix("fastirt ") in galleries else None
        extra: dict[str, Any] = {"GB/s": 4e-6 * params["vectors"] * params["D"] / statistics.median(values)}
        if queries > 1 or quality or "brand" in name:
            extra = {}
        if quality:
            extra = {f"recall@{quality['k']}": quality["recall"], "bytes/vector": quality["bytes_per_vector"]}
        results.add(
            figure_of(
                [value / queries for value in values], part="gallery", name=name, unit="ms/query", params=params,
                better="lower", limit=limit, limit_name=limit_name, extra=extra,
            )
        )  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
