"""What each compiled row of `benchmarks step` should take on a GPU: a model, not a measurement.

The kernels come from committed lists, which `benchmarks/predict/record.py` makes; the prices from
`benchmarks/predict/model.py`, which states its assumptions. No GPU and no ceiling is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.predict import kernel_list
from benchmarks.predict.model import GPUS, by_category, category_table, kernel_table, total
from benchmarks.report import MODEL
from benchmarks.results import Results, figure_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", nargs="+", choices=[*GPUS], default=[*GPUS], help="(default: all)")
    parser.add_argument("--only", nargs="+", help="rows of `benchmarks step`, e.g. '+ CUDA graph'")
    parser.add_argument("--kernels", action="store_true", help="list each kernel with its number and price")
    parser.add_argument("--lists", type=Path, default=kernel_list.FOLDER, help="folder (default: %(default)s)")


def run(args: argparse.Namespace, results: Results) -> None:
    lists = kernel_list.read_all(args.lists)
    if args.only:
        lists = [content for content in lists if content["row"] in args.only]
    if not lists:
        results.not_run("predict", ", ".join(args.only), f"no such row in {args.lists}")
    for name in args.gpu:
        gpu = GPUS[name]
        for content in lists:
            kernels, sizes = content["kernels"], content["sizes"]
            cost = total(kernels, gpu)
            rate = sizes["batch_size"] / cost.us * 1e6
            categories = {name: vars(cost) for name, cost in by_category(kernels, gpu).items()}
            extra = {
                "ms": cost.us / 1e3, "launches": cost.launches, "MB": cost.bytes / 1e6, "GFLOP": cost.flops / 1e9,
                "categories": categories,
            }  # fmt: skip
            row, params = f"{MODEL}, {content['row']}", {"gpu": name, **sizes}
            results.add(figure_of([rate], part="predict", name=row, unit="imgs/s", params=params, extra=extra))
            if args.kernels:
                title = f"{content['row']}, batch {sizes['batch_size']}, {name}: {MODEL}"
                print(f"\n{title}\n\n{category_table(kernels, gpu)}\n\n{kernel_table(kernels, gpu)}\n")
