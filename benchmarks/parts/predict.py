"""What each compiled row of `benchmarks step` should take on a GPU: a model, not a measurement.

The kernels come from committed lists, which `benchmarks/predict/record.py` makes; the prices from
`benchmarks/predict/model.py`, which states its assumptions. No GPU and no ceiling is needed.
"""

from __future__ import annotations

import argparse

from benchmarks.parts.step import ABLATIONS, WATERFALL
from benchmarks.predict import kernel_list
from benchmarks.predict.model import GPUS, Cost, by_category, can_run, category_table, kernel_table, total
from benchmarks.report import MODEL
from benchmarks.results import Results, figure_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", nargs="+", choices=[*GPUS], default=[*GPUS], help="(default: all)")
    parser.add_argument("--only", nargs="+", help="rows of `benchmarks step`, e.g. '+ CUDA graph'")
    parser.add_argument("--kernels", action="store_true", help="list each kernel with its number and price")


def run(args: argparse.Namespace, results: Results) -> None:
    rows = [name for name, changes in WATERFALL.items() if changes["engine"] != "eager"] + [*ABLATIONS]
    lists = [content for content in kernel_list.read_all() if not args.only or content["row"] in args.only]
    lists.sort(key=lambda content: (content["sizes"]["batch_size"], rows.index(content["row"])))
    for row in args.only or rows:
        if row not in {content["row"] for content in lists}:
            results.not_run("predict", row, "no list of its kernels in benchmarks/predict/kernels")
    for name in args.gpu:
        gpu = GPUS[name]
        for content in lists:
            kernels, sizes = content["kernels"], content["sizes"]
            if not can_run(kernels, gpu):
                results.not_run("predict", f"{content['row']}, {name}", f"{name} has no fp8 products")
                continue
            cost = total(kernels, gpu)
            rate = sizes["batch_size"] / cost.us * 1e6
            categories = {category: _sums(part) for category, part in by_category(kernels, gpu).items()}
            extra = {**_sums(cost), "categories": categories}
            row, params = f"{MODEL}, {content['row']}", {"gpu": name, **sizes}
            results.add(figure_of([rate], part="predict", name=row, unit="imgs/s", params=params, extra=extra))
            if args.kernels:
                title = f"{content['row']}, batch {sizes['batch_size']}, {name}: {MODEL}"
                print(f"\n{title}\n\n{category_table(kernels, gpu)}\n\n{kernel_table(kernels, gpu)}\n")


def _sums(cost: Cost) -> dict[str, float]:
    sums = {"ms": cost.us / 1e3, "MB": cost.bytes / 1e6, "GFLOP": cost.flops / 1e9}
    return {"launches": cost.launches, **{name: round(value, 4) for name, value in sums.items()}}
