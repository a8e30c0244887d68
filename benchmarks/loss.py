"""The loss, forward and backward: the kernels beside plain PyTorch, torch.compile and pytorch-metric-learning."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import ceilings
from benchmarks.peers import captured, inputs, kernels_missing, losses, step
from benchmarks.timing import Timing, alternate, environment
from fastirt.kernels import REDUCTIONS

PEER_BYTES = 32  # of memory that a peer is taken to need for each pair: eight matrices of float32
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


def counts(rows: int, slots: int, dim: int, item: int) -> tuple[int, int]:
    """(bytes, operations) that forward and backward need at least: batch, memory and labels read in each, the gradient written;
    similarities in each, and the weighted sums."""
    passes = 2 * ((rows + slots) * (dim * item + 8)) + rows * dim * item
    return passes, 3 * 2 * rows * (rows + slots) * dim


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation could take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(
    reduction: str,
    dtype: str,
    dim: int,
    rows: int,
    slots: int,
    *,
    limits: dict[str, float],
    device: torch.device,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row of results for each way to compute the loss."""
    given = inputs(rows, slots, dim, DTYPES[dtype], device)
    torch.compiler.reset()
    calls = {name: step(given, loss) for name, loss in losses(reduction, device, dim).items()}
    skipped = {}
    if device.type != "cuda":
        calls.pop("fastirt", None)  # the interpreter
    elif "fastirt" in calls:
        calls = {"fastirt graph": captured(calls["fastirt"]), **calls}
    if rows * (rows + slots) * PEER_BYTES > free_bytes(device):
        skipped = {name: "not tried: too little free memory" for name in calls if not name.startswith("fastirt")}
    timed = alternate(
        {name: call for name, call in calls.items() if name not in skipped}, device, repeats, graphs=("fastirt graph",)
    )
    moved, operations = counts(rows, slots, dim, DTYPES[dtype].itemsize)
    limit = max(moved / limits["GB/s"] / 1e6, operations / limits[dtype] / 1e9)
    own = timed.get("fastirt")
    table = []
    for name, timing in {**timed, **skipped}.items():
        row = dict(reduction=reduction, dtype=dtype, D=dim, N=rows, M=slots, name=name, limit_ms=limit)
        if isinstance(timing, str):
            table.append({**row, "failed": timing})
            continue
        row |= dict(loss=float(calls[name]()[0]), median_ms=timing.median, p20_ms=timing.p20, p80_ms=timing.p80)
        row |= {"GB/s": moved / timing.median / 1e6, "TFLOP/s": operations / timing.median / 1e9}
        row |= dict(share_of_limit=limit / timing.median, peak_bytes=timing.peak_bytes)
        row |= dict(times_fastirt=timing.median / own.median if isinstance(own, Timing) else None)
        table.append(row)
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
            f"{head} {r['median_ms']:9.3f} ms ({r['p20_ms']:.3f}-{r['p80_ms']:.3f})  {r['GB/s']:8.4g} GB/s  "
            f"{r['TFLOP/s']:8.4g} TFLOP/s  {100 * r['share_of_limit']:5.1f} % of the limit{peak}{ratio}"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"--device {args.device}: there is no GPU here", file=sys.stderr)
        return 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limits = ceilings(device)
    said = ", ".join(f"{name} {value:.4g}" for name, value in limits.items())
    print(f"limits here: {said} (products in TFLOP/s)")
    if device.type != "cuda":
        print("no GPU: the kernels are left out, their interpreter is not worth timing")
    else:
        missing = {kernels_missing(device, dim) for dim in args.dim} - {""}
        print("".join(f"the kernels are left out: {why}\n" for why in sorted(missing)), end="")
    about, table = environment(device), []
    for setup in itertools.product(args.reduction, args.dtype, args.dim, args.rows, args.slots):
        found = measure(*setup, limits=limits, device=device, repeats=args.repeats)
        print(_lines(found), flush=True)
        table += found
        if args.out:  # after every setup: a run that is cut off leaves what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            result = {"environment": about, "limits": limits, "rows": table}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.out:
        print(f"wrote {args.out}")
    return 0
