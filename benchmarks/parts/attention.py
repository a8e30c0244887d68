"""Attention of a ViT-S block at 197 tokens, forward and backward: torch's choice of backend, each
backend by itself, and padded sequences."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any, Callable

import torch

from benchmarks.contenders.model_variants import ATTENTION_IMPLS, attention
from benchmarks.results import Results, figure_of
from benchmarks.rounds import milliseconds, repeated
from benchmarks.timing import as_cuda_graph, peak, reason, release, turns

PASSES_IN_GRAPH = 10


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, help="(default: 64; on a CPU 4)")
    parser.add_argument("--heads", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=197, help="(default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="of each head (default: %(default)s)")


def run(args: argparse.Namespace, results: Results) -> None:
    device, on_gpu = results.device, results.device.type == "cuda"
    batch_size = args.batch_size or (64 if on_gpu else 1 if args.quick else 4)
    dtype, precision = (torch.bfloat16, "bf16") if on_gpu else (torch.float32, "fp32")
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch_size, args.heads, args.tokens, args.dim)
    inputs = [torch.randn(shape, dtype=dtype, device=device, generator=generator).requires_grad_() for _ in range(3)]
    grad_output = torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def forward_backward(name: str) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attention(name, *inputs), inputs, grad_output)

    calls, peaks = {}, {}
    for name in ATTENTION_IMPLS:
        try:
            forward_backward(name)()
            peaks[name] = peak(forward_backward(name), device)
            calls[name] = (
                as_cuda_graph(partial(repeated, forward_backward(name), PASSES_IN_GRAPH))
                if on_gpu
                else forward_backward(name)
            )
        except Exception as error:  # the backend is missing, or does not support these inputs
            results.not_run("attention", name, reason(error))
            release(device)
    # two products forward, five backward
    operations = 7 * 2 * batch_size * args.heads * args.tokens**2 * args.dim
    params = dict(batch_size=batch_size, heads=args.heads, tokens=args.tokens, dim=args.dim, dtype=str(dtype)[6:])
    limit = operations / results.limits[precision] / 1e9
    repeats = args.repeats or ((3 if args.quick else 20) if on_gpu else 2 if args.quick else 7)
    for due, together in turns(list(calls), device):
        timed = milliseconds({name: calls[name] for name in together}, device, repeats, PASSES_IN_GRAPH, steps=2)
        for name in due:
            values = timed[name]
            if isinstance(values, str):
                results.not_run("attention", name, values)
                continue
            extra = {"TFLOP/s": operations / statistics.median(values) / 1e9, "peak_bytes": peaks[name]}
            results.add(
                figure_of(
                    values, part="attention", name=name, unit="ms", params=params, better="lower", limit=limit,
                    limit_name=f"{precision} products", extra=extra,
                )
            )  # fmt: skip
