"""Evaluation of unit vectors: fastirt's ranks beside FAISS, plain torch, pytorch-metric-learning
and the bare product."""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import Results, figure_of
from benchmarks.rounds import Rounds, run_interleaved
from benchmarks.timing import reason, turns
from fastirt.retrieval.counting import TILE, products
from fastirt.retrieval.metrics import PositivesByLabel, retrieval_metrics
from fastirt.retrieval.rank_backends import BLOCK
from fastirt.retrieval.ranks import positive_ranks, threads_over_blocks

CHUNK = 1024  # queries in a product of the brute force
BARE = "bare product"
NOISE = 2.0  # beside class centers of the same size: Recall@1 is about 0.8 at SOP's size
# OpenBLAS, in FAISS, starts no more threads than these say.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Set(NamedTuple):
    """Sizes of a test set. A set whose queries are its gallery excludes each query's own row."""

    queries: int
    gallery: int
    classes: int
    k: int  # largest K of Recall@K that the paper reports
    same: bool


SETS = {
    "sop": Set(60502, 60502, 11316, 1000, True),
    "inshop": Set(14218, 12612, 3985, 50, False),
    "cub200": Set(5924, 5924, 100, 32, True),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sizes of these (default: all)")
    parser.add_argument("--queries", type=int, help="use at most N queries (default: all; on a CPU 3072 of sop)")
    parser.add_argument("--dim", type=int, default=384, help="D, length of a vector (default: %(default)s)")
    parser.add_argument("--k", type=int, help="neighbors (default: the largest K that the paper reports)")


def inputs(sizes: Set, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query (Q, D), its labels, gallery (G, D), its labels): unit vectors around class centers."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(sizes.classes, dim, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % sizes.classes
        return F.normalize(centers[labels] + NOISE * torch.randn(count, dim, generator=generator), dim=1), labels

    gallery, labels = draw(sizes.gallery)
    if sizes.same:
        return gallery[: sizes.queries], labels[: sizes.queries], gallery, labels
    return (*draw(sizes.queries), gallery, labels)


def bare_product(query: Tensor, gallery: Tensor) -> Callable[[], None]:
    """All similarities and nothing else, each tile in place of the one before it."""
    threads = 1 if query.is_cuda else torch.get_num_threads()

    def block(part: Tensor) -> None:
        for tile in gallery.split(TILE):
            products(part, tile)

    def call() -> None:
        with threads_over_blocks(threads) as run:
            list(run(block, query.split(CHUNK if query.is_cuda else BLOCK)))

    return call


def brute_force(query: Tensor, gallery: Tensor, k: int) -> Callable[[], Tensor]:
    """A call that finds (Q, k) neighbors: a product and topk, chunk by chunk."""
    return lambda: torch.cat([(part @ gallery.T).topk(k).indices for part in query.split(CHUNK)])


def plain_faiss(query: Tensor, gallery: Tensor, k: int) -> Callable[[], Any]:
    """IndexFlatIP as in the FAISS tutorial."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, data = query.cpu().numpy(), gallery.cpu().numpy()

    def call() -> Any:
        index: Any = faiss.IndexFlatIP(data.shape[1])
        if gallery.is_cuda:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gallery.device.index or 0, index)
        index.add(data)
        return index.search(rows, k)[1]

    return call


def metric_learning(
    query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, same: bool
) -> Callable[[], Any]:
    """Precision@1, R-precision and MAP@R by AccuracyCalculator, which searches for max R only."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=query.device)
    return lambda: calculator.get_accuracy(query, query_labels, gallery, gallery_labels, ref_includes_query=same)


def contenders(sizes: Set, dim: int, device: torch.device) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what makes the call that is timed."""
    tensors = inputs(sizes, dim)
    query, query_labels, gallery, labels = (tensor.to(device) for tensor in tensors)
    own = torch.arange(sizes.queries) if sizes.same else None
    # What the metrics need, MAP@R among them; a query of its own gallery finds itself too.
    neighbors = max(sizes.k, int(torch.bincount(tensors[3]).max()) - sizes.same) + sizes.same

    def ours(backend: str) -> Callable[[], Any]:
        def call() -> Any:
            labelled = PositivesByLabel(*tensors, [1, sizes.k], own)
            lists = labelled.lists(0, sizes.queries)
            return positive_ranks(tensors[0], tensors[2], *lists, backend=backend, device=device, depth=labelled.depth)

        return call

    return {
        "fastirt": lambda: ours("ranks"),
        "fastirt, all metrics": lambda: (
            lambda: retrieval_metrics(*tensors, [1, sizes.k], exclude=own, backend="ranks", device=device)
        ),
        "fastirt (FAISS)": lambda: ours("faiss"),
        "FAISS IndexFlatIP": lambda: plain_faiss(query, gallery, neighbors),
        "torch product + topk": lambda: brute_force(query, gallery, neighbors),
        "metric-learning": lambda: metric_learning(query, query_labels, gallery, labels, sizes.same),
        BARE: lambda: bare_product(query, gallery),
    }


def run(args: argparse.Namespace, results: Results) -> None:
    on_gpu = results.device.type == "cuda"
    slowed = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    threads = torch.get_num_threads()
    print(f"retrieval: FAISS has {threads} OpenMP threads; {', '.join(slowed) or 'no variable'} limits its OpenBLAS")
    for name in args.sets:
        sizes = SETS[name]
        if args.quick:
            sizes = Set(500, 500 if sizes.same else 400, max(4, sizes.classes // 100), 20, sizes.same)
        few = 3072 if name == "sop" and not on_gpu else sizes.queries
        queries = min(sizes.queries, args.queries or few)
        sizes = sizes._replace(queries=queries, k=min(args.k or sizes.k, sizes.gallery - 2))
        _time(name, sizes, args, results)


def _time(set_name: str, sizes: Set, args: argparse.Namespace, results: Results) -> None:
    device, calls = results.device, {}
    for name, make in contenders(sizes, args.dim, device).items():
        try:
            calls[name] = make()
            calls[name]()
        except Exception as error:  # the library is missing, or does not work on this machine
            calls.pop(name, None)
            results.not_run("retrieval", name, reason(error))
    limit, limit_name = results.limits["fp32"] * 1e12 / (2 * sizes.gallery * args.dim), "fp32 products"
    params = dict(set=set_name, queries=sizes.queries, gallery=sizes.gallery, D=args.dim, k=sizes.k)
    repeats = args.repeats or (3 if args.quick else 5)
    for due, together in turns(list(calls), device):
        timed = run_interleaved({name: calls[name] for name in together}, device, repeats, steps=1, warm_up=1)
        if device.type == "cpu" and isinstance(bare := timed.get(BARE), Rounds):
            limit, limit_name = sizes.queries / statistics.median(bare.seconds), BARE
        for name in due:
            rounds = timed[name]
            if isinstance(rounds, str):
                results.not_run("retrieval", name, rounds)
                continue
            rates = [sizes.queries / seconds for seconds in rounds.seconds]
            results.add(
                figure_of(
                    rates, part="retrieval", name=name, unit="queries/s", params=params, limit=limit,
                    limit_name=limit_name, extra={"peak_bytes": rounds.peak_bytes},
                )
            )  # fmt: skip
