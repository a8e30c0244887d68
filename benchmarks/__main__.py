"""python -m benchmarks PART [PART ...], or all, report or compare. PARTS lists the parts.

Several parts may be named: they run in one process, the ceilings are measured once, and each flag
goes to the parts that have it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from pathlib import Path

import torch
import torch._dynamo

from benchmarks import compare, report
from benchmarks.ceilings import ceilings
from benchmarks.results import Results, default_path, device_name, figure_of
from benchmarks.timing import reason, release

# Most important first. Each module in parts/ has `add_flags(parser)` and `run(args, results)`.
PARTS = {
    "step": "the whole training step: engines, precisions, and the public recipe",
    "loss": "the loss, forward and backward: kernels or tiles, PyTorch, torch.compile, pytorch-metric-learning",
    "cache": "from cached images to the step's input buffer",
    "input": "from images to batches: DALI, packed store, torchvision, the public recipe's loader",
    "attention": "attention backends and padded sequences",
    "products": "the model's matrix products, at the sizes of a step",
    "train": "whole runs, from image files to updated weights",
    "embed": "from image files to vectors on disk: timm's inference, a plain loop",
    "retrieval": "exact nearest neighbours: FAISS, plain torch",
    "gallery": "search in a gallery on disk: FAISS, plain torch",
    "scaling": "the step on as many ranks as this machine has, and a model of more ranks",
    "predict": "the step's kernels, and a model of their time on a GPU; needs none",
}
WITHOUT_CEILINGS = {"predict"}  # they measure nothing
UNITS = {"GB/s": "GB/s", "h2d GB/s": "GB/s", "bf16": "TFLOP/s", "tf32": "TFLOP/s", "fp32": "TFLOP/s"}


def main(argv: list[str] | None = None) -> int:
    """Exit code. 0: success; 1: a part failed, or a figure fell (`compare`); 2: unusable input."""
    argv = sys.argv[1:] if argv is None else argv
    named = list(itertools.takewhile(PARTS.__contains__, argv))
    if len(named) > 1:
        flags = _flags_of_parts(list(dict.fromkeys(named)), argv[len(named) :])
        args = next(iter(flags.values()))
    else:
        args = _parser().parse_args(argv)
        if args.part in ("report", "compare"):
            return {"report": report, "compare": compare}[args.part].main(args)
        if args.part in PARTS:
            flags = {args.part: args}
        else:  # all
            flags = {name: _part_parser(name).parse_args(_common_argv(args)) for name in PARTS}
    return _measure(args, flags)


def _measure(args: argparse.Namespace, flags: dict[str, argparse.Namespace]) -> int:
    """Measure the ceilings, then each part of `flags`; `args` has the common flags."""
    _allow_recompiling()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print(f"benchmarks: error: --device {args.device}: there is no GPU here", file=sys.stderr)
            return 2
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    elif set(flags) - WITHOUT_CEILINGS:
        print("no GPU: small sizes and CPU figures")
    name = "predict" if set(flags) <= WITHOUT_CEILINGS else device_name(device)
    path = None if args.no_save else args.out or default_path(name)
    results = Results(path, device, {})
    try:
        if set(flags) - WITHOUT_CEILINGS:
            _measure_ceilings(device, args.quick, results)
    except OSError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    failed = 0
    for name, part_args in flags.items():
        try:
            importlib.import_module(f"benchmarks.parts.{name}").run(part_args, results)
        except Exception as error:  # the other parts still run
            if len(flags) == 1:
                raise
            failed += 1
            results.not_run(name, "all", reason(error))
        release(device)
    if path is not None:
        print(f"wrote {path}")
    return 1 if failed else 0


def _measure_ceilings(device: torch.device, quick: bool, results: Results) -> None:
    """Add a figure for each ceiling and take their medians as the limits of the figures to come."""
    for name, rates in ceilings(device, quick).items():
        results.add(figure_of(rates, part="ceilings", name=name, unit=UNITS[name], params={}))
    results.limits.update({figure.name: figure.p50 for figure in results.figures})
    # A CPU may be slower at a lower precision; work at that precision may then use the higher one.
    for lower, higher in (("tf32", "fp32"), ("bf16", "tf32")):
        results.limits[lower] = max(results.limits[lower], results.limits[higher])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measurements beside their limits. "
        "Several parts may be named: each flag goes to the parts that have it.",
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="|".join([*PARTS, "all", "report", "compare"]))

    for name, help in PARTS.items():
        part = _with_common_flags(parts.add_parser(name, help=help, description=help))
        importlib.import_module(f"benchmarks.parts.{name}").add_flags(part)
    _with_common_flags(parts.add_parser("all", help="every part above, in that order"))
    report.add_flags(parts.add_parser("report", help="tables for the README and plots, from results files alone"))
    compare.add_flags(parts.add_parser("compare", help="did a figure fall by more than its noise allows?"))
    return parser


def _part_parser(name: str) -> argparse.ArgumentParser:
    parser = _with_common_flags(argparse.ArgumentParser(prog=f"python -m benchmarks {name}"))
    importlib.import_module(f"benchmarks.parts.{name}").add_flags(parser)
    return parser


def _flags_of_parts(names: list[str], argv: list[str]) -> dict[str, argparse.Namespace]:
    """Split one command line among several parts: each flag, with its values, goes to every part
    that has it. A flag that no part has is an error."""
    parsers = {name: _part_parser(name) for name in names}
    flags: list[list[str]] = []
    for word in argv:
        if word.startswith("-") or not flags:
            flags.append([])
        flags[-1].append(word)
    known = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    argv_of_part: dict[str, list[str]] = {name: [] for name in names}
    for flag in flags:
        takers = [name for name in names if flag[0].partition("=")[0] in known[name]]
        if not takers:
            _parser().error(f"{' '.join(flag)}: none of {', '.join(names)} has this flag")
        for name in takers:
            argv_of_part[name] += flag
    return {name: parser.parse_args(argv_of_part[name]) for name, parser in parsers.items()}


def _allow_recompiling() -> None:
    """Each contender recompiles shared code; beyond dynamo's default limit of 8 the last ones would
    silently run eager."""
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(1 << 16, getattr(config, limit)))


def _with_common_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (default: the part's own)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, few rounds")
    parser.add_argument(
        "--out", type=Path, help="results file, appended to (default: benchmarks/results/DATE-DEVICE.jsonl)"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser


def _common_argv(args: argparse.Namespace) -> list[str]:
    """The common flags of `all`, for each part's own parser."""
    argv = ["--device", args.device]
    argv += ["--repeats", str(args.repeats)] if args.repeats else []
    return argv + (["--quick"] if args.quick else [])


if __name__ == "__main__":
    sys.exit(main())
