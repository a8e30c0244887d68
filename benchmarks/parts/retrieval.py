"""Exact nearest neighbours over unit vectors: fastirt's search, brute-force torch, plain FAISS."""

from __future__ import annotations

import argparse
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import Results, figure_of
from benchmarks.rounds import in_turns
from fastirt.retrieval.search import search

CHUNK = 1024  # queries of a plain product


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, help="and as many gallery vectors (default: 60502; on a CPU 3000)")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, help="neighbours (default: 1000; on a CPU 100)")


def brute_force(vectors: Tensor, k: int) -> Callable[[], Tensor]:
    """(Q, k) neighbours of each vector among all, itself excluded: a product and topk, chunk by chunk."""

    def call() -> Tensor:
        found = []
        for start in range(0, len(vectors), CHUNK):
            scores = vectors[start : start + CHUNK] @ vectors.T
            rows = torch.arange(len(scores), device=vectors.device)
            scores[rows, rows + start] = -torch.inf
            found.append(scores.topk(k).indices)
        return torch.cat(found)

    return call


def plain_faiss(vectors: Tensor, k: int) -> Callable[[], Any]:
    """IndexFlatIP as its tutorial uses it; the query itself comes back as a neighbour."""
    import faiss

    data = vectors.cpu().numpy()

    def call() -> Any:
        index = faiss.IndexFlatIP(data.shape[1])
        if vectors.is_cuda:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), vectors.device.index or 0, index)
        index.add(data)
        return index.search(data, k + 1)[1]

    return call


def run(args: argparse.Namespace, results: Results) -> None:
    device, on_gpu = results.device, results.device.type == "cuda"
    count = args.queries or (500 if args.quick else 60502 if on_gpu else 3000)
    k = min(args.k or (20 if args.quick else 1000 if on_gpu else 100), count - 2)
    generator = torch.Generator().manual_seed(0)
    host = F.normalize(torch.randn(count, args.dim, generator=generator), dim=1)
    vectors = host.to(device)

    def ours(backend: str) -> Callable[[], Any]:
        return lambda: [
            found for _, _, found in search(host, host, k, exclude_self=True, backend=backend, device=device)
        ]

    contenders: dict[str, Callable[[], Any]] = {}
    for name, make in (
        ("fastirt (FAISS)", lambda: ours("faiss")),
        ("fastirt (torch)", lambda: ours("torch")),
        ("torch product + topk", lambda: brute_force(vectors, k)),
        ("FAISS IndexFlatIP", lambda: plain_faiss(vectors, k)),
    ):
        try:
            call = make()
            call()
            contenders[name] = call
        except Exception as error:  # a library that is missing, or cannot do this on this machine
            results.missing(
                "retrieval", name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    timed = in_turns(contenders, device, args.repeats or (3 if args.quick else 5), steps=1, warm_up=1)
    limit = results.limits["fp32"] * 1e12 / (2 * count * args.dim)
    for name, found in timed.items():
        if isinstance(found, str):
            results.missing("retrieval", name, found)
            continue
        rates = [count / seconds for seconds in found.seconds]
        params = dict(queries=count, gallery=count, D=args.dim, k=k)
        results.add(
            figure_of(
                rates, part="retrieval", name=name, unit="queries/s", params=params, limit=limit,
                limit_name="fp32 products", extra={"peak_bytes": found.peak_bytes},
            )
        )  # fmt: skip
