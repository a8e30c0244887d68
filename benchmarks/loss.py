"""The loss, forward and backward: the kernels beside plain PyTorch, torch.compile and pytorch-metric-learning."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ceilings import ceilings
from benchmarks.timing import Timing, alternate, environment
from fastirt.kernels import REDUCTIONS, contrastive_koleo
from fastirt.kernels.checks import choose
from fastirt.kernels.reference import koleo as plain_koleo

LAMBDA = 0.7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 4096], help="N")
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 6000, 59551], help="M, 0: no memory")
    parser.add_argument("--dim", type=int, nargs="+", default=[384], help="D")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--reduction", nargs="+", choices=REDUCTIONS, default=["nonzero_mean"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file")


def inputs(rows: int, slots: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Optional[Tensor]]:
    """Clustered unit vectors, two rows a class; the batch stands in the first slots."""
    generator = torch.Generator(device).manual_seed(0)
    classes = max(2, max(rows, slots) // 5)
    centres = torch.randn(classes, dim, device=device, generator=generator)

    def draw(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), dim, device=device, generator=generator)
        return F.normalize(centres[labels] + noise, dim=1).to(dtype)

    labels = torch.arange(rows, device=device) // 2 % classes
    z = draw(labels)
    if slots == 0:
        return dict(z=z, labels=labels, memory=None, memory_labels=None, memory_self=None)
    memory_labels = torch.randint(classes, (slots,), device=device, generator=generator)
    memory = draw(memory_labels)
    shared = min(rows, slots)
    memory[:shared], memory_labels[:shared] = z[:shared], labels[:shared]
    own = torch.where(torch.arange(rows, device=device) < shared, torch.arange(rows, device=device), -1)
    return dict(z=z, labels=labels, memory=memory, memory_labels=memory_labels, memory_self=own)


def step(given: dict[str, Any], loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that computes (loss, its gradient at z)."""
    z = given["z"].detach().requires_grad_()
    others = [given[name] for name in ("labels", "memory", "memory_labels", "memory_self")]

    def call() -> tuple[Tensor, Tensor]:
        value = loss(z, *others)
        return value.detach(), torch.autograd.grad(value, z)[0]

    return call


def losses(reduction: str, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Every way to compute batch + memory + LAMBDA * koleo, by name. pytorch-metric-learning has no own-slot rule, so its value
    differs where the batch stands in the memory."""

    def ours(impl: str) -> Callable[..., Tensor]:
        def loss(z, labels, memory, memory_labels, own):
            parts = contrastive_koleo(z, labels, memory, memory_labels, memory_self=own, reduction=reduction, impl=impl)
            return parts.batch + parts.memory + LAMBDA * parts.koleo

        return loss

    found = {"plain": ours("reference"), "compiled": torch.compile(ours("reference"), dynamic=False)}
    try:
        choose("triton", torch.empty(1, 64, device=device))
        found = {"fastirt": ours("triton"), **found}
    except ValueError:
        pass
    if reduction == "nonzero_mean":
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.losses import ContrastiveLoss

        contrastive = ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=CosineSimilarity())

        def metric_learning(z, labels, memory, memory_labels, own):
            value = contrastive(z, labels) + LAMBDA * plain_koleo(z)
            return value if memory is None else value + contrastive(z, labels, ref_emb=memory, ref_labels=memory_labels)

        found["metric-learning"] = metric_learning
    return found


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call as one CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def counts(rows: int, slots: int, dim: int, item: int) -> tuple[int, int]:
    """(bytes, operations) that forward and backward need at least: batch, memory and labels read in each, the gradient written;
    similarities in each, and the weighted sums."""
    passes = 2 * ((rows + slots) * (dim * item + 8)) + rows * dim * item
    return passes, 3 * 2 * rows * (rows + slots) * dim


def measure(args: argparse.Namespace, limits: dict[str, float], device: torch.device) -> list[dict[str, Any]]:
    table = []
    grid = itertools.product(args.reduction, args.dtype, args.dim, args.rows, args.slots)
    for reduction, dtype, dim, rows, slots in grid:
        given = inputs(rows, slots, dim, DTYPES[dtype], device)
        torch.compiler.reset()
        calls = {name: step(given, loss) for name, loss in losses(reduction, device).items()}
        if device.type == "cuda" and "fastirt" in calls:
            calls = {"fastirt graph": captured(calls["fastirt"]), **calls}
        timed = alternate(calls, device, args.repeats)
        moved, operations = counts(rows, slots, dim, DTYPES[dtype].itemsize)
        limit = max(moved / limits["GB/s"] / 1e6, operations / limits[dtype] / 1e9)
        best = next((timed[name] for name in ("fastirt graph", "fastirt") if isinstance(timed.get(name), Timing)), None)
        for name, timing in timed.items():
            row = dict(reduction=reduction, dtype=dtype, D=dim, N=rows, M=slots, name=name, limit_ms=limit)
            if isinstance(timing, str):
                table.append({**row, "failed": timing})
                continue
            row |= dict(median_ms=timing.median, p20_ms=timing.p20, p80_ms=timing.p80, peak_bytes=timing.peak_bytes)
            row |= {"GB/s": moved / timing.median / 1e6, "TFLOP/s": operations / timing.median / 1e9}
            row |= dict(share_of_limit=limit / timing.median, times_fastirt=best and timing.median / best.median)
            table.append(row)
        print(_lines(table[-len(timed) :]), flush=True)
    return table


def _lines(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        head = f"{r['reduction']} {r['dtype']} N={r['N']:<5} M={r['M']:<6} D={r['D']:<5}{r['name']:16}"
        if "failed" in r:
            lines.append(f"{head} {r['failed']}")
            continue
        peak = "" if r["peak_bytes"] is None else f"  peak {r['peak_bytes'] / 2**20:8.1f} MiB"
        ratio = f"  {r['times_fastirt']:6.2f} x fastirt" if r["times_fastirt"] else ""
        lines.append(
            f"{head} {r['median_ms']:9.3f} ms ({r['p20_ms']:.3f}-{r['p80_ms']:.3f})  {r['GB/s']:7.1f} GB/s  "
            f"{r['TFLOP/s']:7.2f} TFLOP/s  {100 * r['share_of_limit']:5.1f} % of the limit{peak}{ratio}"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    limits = ceilings(device)
    print("limits here: " + ", ".join(f"{name} {value:,.1f}" for name, value in limits.items()) + " (products in TFLOP/s)")
    if device.type != "cuda":
        print("no GPU: the kernels are left out, their interpreter is not worth timing")
    table = measure(args, limits, device)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": environment(device), "limits": limits, "rows": table}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.out}")
    return 0
