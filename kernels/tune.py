"""Measures tiles on this machine's GPU and prints the fastest as a row of `tile_table.TABLE`.

python -m fastirt.kernels.tune --rows 64 --slots 59551 --dim 384 --precision bf16 --columns bf16
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from dataclasses import fields
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
from triton.errors import TritonError

from fastirt.kernels.passes import launch
from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.plan import cdiv, machine
from fastirt.kernels.reference import PairOptions
from fastirt.kernels.rounding import product_operand
from fastirt.kernels.variants.tile_table import Tile, product_dtype

PRECISIONS = ("bf16", "tf32", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Fits every GPU: the forward pass whose results the backward needs.
SAFE = Tile(16, 16, 64, 4, 1, grad_chunks=1)
# Registers of a thread's 255 that the sums of a tile may take; with more they would spill.
PER_THREAD = 128


def candidates(kind: str, precision: str, columns: str, dim: int, shared: int) -> Iterator[Tile]:
    """Tiles to try on a GPU with `shared` bytes of shared memory a program; some may not fit."""
    for bm, bn, bd, warps, stages, waves in itertools.product(
        (32, 64, 128), (16, 32, 64, 128), (64, 128), (4, 8), (2, 3), (1, 2)
    ):
        chunks = cdiv(dim, bd)
        row_bytes, column_bytes = DTYPES[product_dtype(precision)].itemsize, DTYPES[columns].itemsize
        if (bm * row_bytes + bn * (stages - 1) * column_bytes) * chunks * bd > shared:
            continue
        for grad_chunks in {chunks, chunks // 2 if chunks % 2 == 0 else chunks} if kind == "grad" else (0,):
            if bm * max(bn, grad_chunks * bd) > PER_THREAD * 32 * warps:
                continue
            for skip_inactive in (False, True) if kind == "grad" else (False,):
                yield Tile(bm, bn, bd, warps, stages, grad_chunks=grad_chunks, skip_inactive=skip_inactive, waves=waves)


def tile_arguments(tile: Tile) -> str:
    """Arguments of `Tile` as in the table: sizes by position, others if not the default."""
    sizes = [getattr(tile, name) for name in ("bm", "bn", "bd", "warps", "stages")]
    others = [field for field in fields(Tile) if field.name in ("grad_chunks", "skip_inactive", "waves")]
    named = [f"{f.name}={getattr(tile, f.name)}" for f in others if getattr(tile, f.name) != f.default]
    return ", ".join([*map(str, sizes), *named])


def row(kind: str, arch: int, precision: str, columns: str, dim: int, rows: int, tile: Tile, gpu: str) -> str:
    """A line of `tile_table.TABLE`."""
    key = f'"{kind}", ({arch},), "{precision}", ("{columns}",), {dim}, {rows}'
    return f'TileRow({key}, Tile({tile_arguments(tile)}, source="{gpu}")),'


def milliseconds(call: Callable[[], object]) -> float:
    """Median time on the device with a cold L2, without the host: a CUDA graph is replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return triton.testing.do_bench(graph.replay, warmup=5, rep=20, return_mode="median")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="N")
    parser.add_argument("--slots", type=int, default=59551, help="M")
    parser.add_argument("--dim", type=int, default=384, help="D")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the products")
    parser.add_argument("--columns", choices=DTYPES, default="bf16", help="dtype of the memory")
    parser.add_argument("--kind", choices=("stats", "grad"), nargs="+", default=["stats", "grad"])
    parser.add_argument("--margin", type=float, default=0.5, help="-2: every pair costs, as early in training")
    args = parser.parse_args()
    if not torch.cuda.is_available() or INTERPRETED:
        print("fastirt.kernels.tune: needs a GPU, and TRITON_INTERPRET unset", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    call = problem(args, device)
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    for kind in args.kind:
        best, tried, failed = None, 0, 0
        for tile in candidates(kind, args.precision, args.columns, args.dim, shared):
            tried += 1
            try:
                time = milliseconds(functools.partial(call, kind, tile))
            except (TritonError, RuntimeError):  # too large for this GPU, or does not compile
                failed += 1
                continue
            if best is None or time < best[0]:
                best = time, tile
                print(f"# {time:.4f} ms  {tile_arguments(tile)}", file=sys.stderr, flush=True)
        if best is None:
            print(f"fastirt.kernels.tune: none of {tried} tiles ran for {kind}", file=sys.stderr)
            return 1
        print(
            f"# {best[0]:.4f} ms, the fastest of {tried - failed} tiles ({failed} did not run) "
            f"at N = {args.rows}, M = {args.slots}, margin {args.margin}"
        )
        gpu = torch.cuda.get_device_name(device)
        key = (kind, machine(device)[0], args.precision, args.columns, args.dim, args.rows)
        print(row(*key, best[1], gpu))
    return 0


def problem(args: argparse.Namespace, device: torch.device) -> Callable[[str, Tile], object]:
    """A function of (kind, tile) that runs one pass over random vectors.

    Each class has two rows and five slots; the slots are in random order.
    """
    z, memory = (F.normalize(torch.randn(n, args.dim, device=device), dim=1) for n in (args.rows, args.slots))
    z, memory = product_operand(z, args.precision), memory.to(DTYPES[args.columns])
    labels = torch.arange(args.rows, device=device) // 2
    memory_labels = torch.randperm(args.slots, device=device) // 5
    options = PairOptions(args.margin, "nonzero_mean", precision=args.precision, finite_slots=True)
    arguments = (z, labels, launch.Columns(z, labels), launch.Columns(memory, memory_labels), options)
    stats = launch.forward(*arguments, tile=SAFE)
    one = torch.ones((), device=device)

    def call(kind: str, tile: Tile) -> object:
        if kind == "stats":
            return launch.forward(*arguments, tile=tile)
        return launch.backward(
            *arguments, scales=stats.scales, grads=(one, one, one), rho=stats.rho, index=stats.index, tile=tile
        )

    return call


if __name__ == "__main__":
    sys.exit(main())
