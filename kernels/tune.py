"""Measures tiles on the GPU at hand and prints the fastest as a row of `configs.TABLE`.

python -m fastirt.kernels.tune --rows 64 --slots 59551 --dim 384 --precision bf16 [--kind stats|grad]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Iterator

import torch
import torch.nn.functional as F
import triton

from fastirt.kernels import launch
from fastirt.kernels.configs import Tile
from fastirt.kernels.plan import machine
from fastirt.kernels.tiles import INTERPRETED


def candidates(kind: str, dim: int) -> Iterator[Tile]:
    """Tiles worth a try; those that do not fit are found by trying."""
    for bm, bn, bd, warps, stages, waves in itertools.product((32, 64, 128), (16, 32, 64, 128), (64, 128), (4, 8), (1, 2, 3), (1, 2)):
        chunks = -(-dim // bd)
        outs = sorted({chunks, -(-chunks // 2)}) if kind == "grad" else [0]
        for out, skip in itertools.product(outs, (False, True) if kind == "grad" else (False,)):
            yield Tile(bm, bn, bd, warps, stages, out=out, skip=skip, waves=waves)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="N")
    parser.add_argument("--slots", type=int, default=59551, help="M")
    parser.add_argument("--dim", type=int, default=384, help="D")
    parser.add_argument("--precision", choices=("bf16", "tf32", "fp32"), default="bf16")
    parser.add_argument("--kind", choices=("stats", "grad"), nargs="+", default=["stats", "grad"])
    args = parser.parse_args()
    if not torch.cuda.is_available() or INTERPRETED:
        print("fastirt.kernels.tune: needs a GPU, and TRITON_INTERPRET unset", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    z, memory = (F.normalize(torch.randn(n, args.dim, device=device), dim=1).to(dtype) for n in (args.rows, args.slots))
    labels, memory_labels = torch.arange(args.rows, device=device) // 2, torch.arange(args.slots, device=device) // 5
    batch, against = launch.Columns(z, labels), launch.Columns(memory, memory_labels)
    options = dict(margin=0.5, nonzero=True, koleo_eps=1e-8, distance_eps=1e-6, precision=args.precision)
    found = launch.forward(z, labels, batch, against, **options)
    one = torch.ones((), device=device)

    def call(kind: str, tile: Tile) -> None:
        if kind == "stats":
            launch.forward(z, labels, batch, against, tile=tile, **options)
        else:
            launch.backward(
                z, labels, batch, against, scales=found.scales, grads=(one, one, one), rho=found.rho, index=found.index,
                tile=tile, **options,
            )  # fmt: skip

    for kind in args.kind:
        timed = []
        for tile in candidates(kind, args.dim):
            try:
                timed.append((triton.testing.do_bench(lambda: call(kind, tile), warmup=5, rep=20), tile))
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
                continue  # too large for this GPU, or refused by the compiler
        time, tile = min(timed, key=lambda pair: pair[0])
        options_said = f"out={tile.out}, waves={tile.waves}, skip={tile.skip}, source={torch.cuda.get_device_name()!r}"
        print(f"# {time:.4f} ms of {len(timed)} tiles at N = {args.rows}, M = {args.slots}")
        print(
            f'Row("{kind}", ({machine(device)[0]},), "{args.precision}", {args.dim}, {args.rows}, '
            f"Tile({tile.bm}, {tile.bn}, {tile.bd}, {tile.warps}, {tile.stages}, {options_said})),"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
