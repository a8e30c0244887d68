"""The matrix products of a transformer block at the sizes of a training step, beside a large square
product: what share of the machine's rate short inner lengths such as K = 384 reach."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any, Callable

import torch

from benchmarks.results import Results, figure_of
from benchmarks.rounds import milliseconds, repeated
from benchmarks.timing import as_cuda_graph, reason, release, turns

PRODUCTS_IN_GRAPH = 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, help="images (default: 64; on a CPU 4)")
    parser.add_argument("--tokens", type=int, default=197, help="of an image (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="width of the model (default: %(default)s)")


def shapes(rows: int, dim: int) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) of the products (M, K) x (K, N) of a block's four linear layers.

    Forward, the gradient of the input, and the gradient of the weight, whose inner length K is the
    number of tokens.
    """
    found = {}
    for layer, inputs, outputs in (("qkv", 1, 3), ("projection", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1)):
        found[f"{layer}, forward"] = (rows, outputs * dim, inputs * dim)
        found[f"{layer}, gradient of input"] = (rows, inputs * dim, outputs * dim)
        found[f"{layer}, gradient of weight"] = (outputs * dim, inputs * dim, rows)
    return found


def run(args: argparse.Namespace, results: Results) -> None:
    device, on_gpu = results.device, results.device.type == "cuda"
    rows = (args.batch_size or (64 if on_gpu else 1 if args.quick else 4)) * args.tokens
    dtype, precision = (torch.bfloat16, "bf16") if on_gpu else (torch.float32, "fp32")
    sizes = shapes(rows, args.dim)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (m, n, k) in sizes.items():
        left, right = (torch.randn(shape, dtype=dtype, device=device) for shape in ((m, k), (k, n)))
        calls[name] = partial(torch.matmul, left, right)
    if on_gpu:  # in graphs: a launch from Python may take longer than the product
        for name, call in list(calls.items()):
            try:
                calls[name] = as_cuda_graph(partial(repeated, call, PRODUCTS_IN_GRAPH))
            except Exception as error:
                results.not_run("products", name, reason(error))
                del calls[name]
                release(device)
    repeats = args.repeats or (10 if on_gpu else 5)
    for due, together in turns(list(calls), device):
        timed = milliseconds({name: calls[name] for name in together}, device, repeats, PRODUCTS_IN_GRAPH, steps=1)
        for name in due:
            values = timed[name]
            if isinstance(values, str):
                results.not_run("products", name, values)
                continue
            m, n, k = sizes[name]
            flops = 2 * m * n * k
            results.add(
                figure_of(
                    values, part="products", name=name, unit="ms", better="lower", limit_name=f"{precision} products",
                    params=dict(M=m, N=n, K=k, dtype=str(dtype)[6:]), limit=flops / results.limits[precision] / 1e9,
                    extra={"TFLOP/s": flops / statistics.median(values) / 1e9},
                )
            )  # fmt: skip
