"""Exact nearest neighbours of unit vectors: fastirt's search, brute-force torch, plain FAISS."""

from __future__ import annotations

import argparse
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import Results, figure_of
from benchmarks.rounds import run_interleaved
from benchmarks.timing import reason, turns
from fastirt.retrieval.search import search

CHUNK = 1024  # queries in a product of the brute force


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--queries", type=int, help="queries, and as many gallery vectors (default: 60502; on a CPU 3000)"
    )
    parser.add_argument("--dim", type=int, default=384, help="D, length of a vector (default: %(default)s)")
    parser.add_argument("--k", type=int, help="neighbors (default: 1000; on a CPU 100)")


def brute_force(vectors: Tensor, k: int) -> Callable[[], Tensor]:
    """A call that finds the (Q, k) neighbours of each vector among the others: a product and topk,
    chunk by chunk."""

    def call() -> Tensor:
        neighbors = []
        for start in range(0, len(vectors), CHUNK):
            scores = vectors[start : start + CHUNK] @ vectors.T
            rows = torch.arange(len(scores), device=vectors.device)
            scores[rows, rows + start] = -torch.inf
            neighbors.append(scores.topk(k).indices)
        return torch.cat(neighbors)

    return call


def plain_faiss(vectors: Tensor, k: int) -> Callable[[], Any]:
    """IndexFlatIP as in the FAISS tutorial. The query itself is among its k + 1 neighbors."""
    import faiss

    data = vectors.cpu().numpy()

    def call() -> Any:
        index: Any = faiss.IndexFlatIP(data.shape[1])
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
            indices for _, _, indices in search(host, host, k, exclude_self=True, backend=backend, device=device)
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
        except Exception as error:  # the library is missing, or does not work on this machine
            results.not_run("retrieval", name, reason(error))
    limit = results.limits["fp32"] * 1e12 / (2 * count * args.dim)
    params = dict(queries=count, gallery=count, D=args.dim, k=k)
    repeats = args.repeats or (3 if args.quick else 5)
    for due, together in turns(list(contenders), device):
        timed = run_interleaved({name: contenders[name] for name in together}, device, repeats, steps=1, warm_up=1)
        for name in due:
            rounds = timed[name]
            if isinstance(rounds, str):
                results.not_run("retrieval", name, rounds)
                continue
            rates = [count / seconds for seconds in rounds.seconds]
            results.add(
                figure_of(
                    rates, part="retrieval", name=name, unit="queries/s", params=params, limit=limit,
                    limit_name="fp32 products", extra={"peak_bytes": rounds.peak_bytes},
                )
            )  # fmt: skip
