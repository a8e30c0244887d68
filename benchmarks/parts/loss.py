"""The loss, forward and backward: the kernels, or the tiles on a CPU, beside plain PyTorch,
torch.compile and pytorch-metric-learning."""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch

from benchmarks.contenders.losses import inputs, kernels_missing, losses, step
from benchmarks.contenders.public_recipe import has_metric_learning
from benchmarks.results import Results, figure_of
from benchmarks.timing import as_cuda_graph, reason, release, time_interleaved, turns
from fastirt.kernels import REDUCTIONS
from fastirt.loading.cache_budget import free_memory

PEER_BYTES = 32  # memory that a peer is assumed to need for each pair: eight float32 matrices
GRAPH = "fastirt graph"  # the kernels in a CUDA graph, as in a training run
# "tf32": float32 vectors with tf32 products, the default of a training run.
DTYPES = {"tf32": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, nargs="+", help="N, rows of the batch (default: 64 256 1024 4096; on a CPU 64 256)"
    )
    parser.add_argument(
        "--slots", type=int, nargs="+", help="M, slots of the memory (default: 0 6000 59551; on a CPU 0 6000)"
    )
    parser.add_argument("--dim", type=int, nargs="+", default=[384], help="D, length of a vector (default: 384)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="of vectors and products (default: tf32 bf16 fp32; on a CPU bf16 fp32)",
    )
    parser.add_argument(
        "--reduction", nargs="+", choices=REDUCTIONS, default=["nonzero_mean"], help="(default: nonzero_mean)"
    )


def counts(rows: int, slots: int, dim: int, item: int) -> tuple[int, int]:
    """(bytes, operations) that loss and gradient need at least, in one pass.

    Bytes: batch, memory and labels (`item` bytes an element, 8 a label) are read once, and the
    gradient is written. Operations: the similarities and the weighted sums, once each. Two passes,
    forward and backward, read twice and may compute the similarities twice.
    """
    moved = (rows + slots) * (dim * item + 8) + rows * dim * item
    return moved, 2 * 2 * rows * (rows + slots) * dim


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation can take: free, or free within torch's own blocks."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free_memory("device", device) + unused
    return free_memory("host", device)


def measure(reduction: str, dtype: str, dim: int, rows: int, slots: int, results: Results, repeats: int) -> None:
    """Add a figure for each implementation of the loss."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        _measure(reduction, dtype, dim, rows, slots, results, repeats)
    finally:
        torch.set_float32_matmul_precision(before)


def _measure(reduction: str, dtype: str, dim: int, rows: int, slots: int, results: Results, repeats: int) -> None:
    device, limits = results.device, results.limits
    params = dict(reduction=reduction, dtype=dtype, D=dim, N=rows, M=slots)
    tensors = inputs(rows, slots, dim, DTYPES[dtype], device)
    torch.compiler.reset()
    calls = {name: step(tensors, loss) for name, loss in losses(reduction, device, dim).items()}
    if device.type == "cuda" and "fastirt" in calls:
        try:
            calls = {GRAPH: as_cuda_graph(calls["fastirt"]), **calls}
        except Exception as error:
            results.not_run("loss", GRAPH, f"{reason(error)} at {params}")
            release(device)
    if rows * (rows + slots) * PEER_BYTES > free_bytes(device):
        for name in [name for name in calls if not name.startswith("fastirt")]:
            results.not_run("loss", name, f"too little free memory for {params}")
            del calls[name]
    moved, operations = counts(rows, slots, dim, DTYPES[dtype].itemsize)
    limit = max(moved / limits["GB/s"] / 1e6, operations / limits[dtype] / 1e9)
    for due, together in turns(list(calls), device):
        timed, peaks = time_interleaved({name: calls[name] for name in together}, device, repeats, graphs=(GRAPH,))
        graph = timed.get(GRAPH)
        for name in due:
            values = timed[name]
            if isinstance(values, str):
                results.not_run("loss", name, f"{values} at {params}")
                continue
            median = statistics.median(values)
            extra: dict[str, Any] = {"GB/s": moved / median / 1e6, "TFLOP/s": operations / median / 1e9}
            extra |= {"peak_bytes": peaks[name], "loss": float(calls[name]()[0])}
            if isinstance(graph, list):
                extra["times_graph"] = median / statistics.median(graph)
            results.add(
                figure_of(
                    values, part="loss", name=name, unit="ms", params=params, better="lower", limit=limit,
                    limit_name="one pass at the ceilings", extra=extra,
                )
            )  # fmt: skip


def run(args: argparse.Namespace, results: Results) -> None:
    on_gpu = results.device.type == "cuda"
    rows = args.rows or ([64] if args.quick else [64, 256, 1024, 4096] if on_gpu else [64, 256])
    slots = [6000] if args.quick else [0, 6000, 59551] if on_gpu else [0, 6000]
    slots = slots if args.slots is None else args.slots
    for why in sorted({kernels_missing(results.device, dim) for dim in args.dim} - {""}):
        results.not_run("loss", "fastirt", why)
    if "nonzero_mean" in args.reduction and not has_metric_learning():
        results.not_run("loss", "metric-learning", "no pytorch-metric-learning")
    dtypes = args.dtype or [name for name in DTYPES if on_gpu or name != "tf32"]
    for sizes in itertools.product(args.reduction, dtypes, args.dim, rows, slots):
        measure(*sizes, results, args.repeats or (5 if args.quick else 20))
