"""python -m benchmarks loss|input|cache|step|attention|train|retrieval|scaling|all|report|compare [flags]

Several parts may be named: one process, with ceilings measured once, and each flag for the parts that have it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from benchmarks import compare, report
from benchmarks.ceilings import ceilings
from benchmarks.results import Results, default_path, figure_of
from benchmarks.timing import reason, release

PARTS = {  # each module has `add_flags(parser)` and `run(args, results)`; most important first
    "step": "the whole training step: engines, precisions, and the public recipe",
    "loss": "the loss, forward and backward: kernels, PyTorch, torch.compile, pytorch-metric-learning",
    "cache": "cached pictures to the step's input buffer",
    "input": "pictures to batches: DALI, packed store, torchvision, the public recipe's loader",
    "attention": "attention backends and padded sequences",
    "train": "a run from pictures to updated weights, with what bounds it",
    "retrieval": "exact nearest neighbours: FAISS, plain torch",
    "scaling": "the step on as many ranks as there are, and a model of it on more",
}
UNITS = {"GB/s": "GB/s", "h2d GB/s": "GB/s", "bf16": "TFLOP/s", "tf32": "TFLOP/s", "fp32": "TFLOP/s"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    named = list(itertools.takewhile(PARTS.__contains__, argv))
    if len(named) > 1:
        given = _several(list(dict.fromkeys(named)), argv[len(named) :])
        args = next(iter(given.values()))
    else:
        args = _parser().parse_args(argv)
        if args.part in ("report", "compare"):
            return {"report": report, "compare": compare}[args.part].main(args)
        given = (
            {args.part: args} if args.part in PARTS else {name: _part(name).parse_args(_again(args)) for name in PARTS}
        )
    _allow_recompiling()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print(f"benchmarks: error: --device {args.device}: there is no GPU here", file=sys.stderr)
            return 2
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        print("no GPU: small sizes, CPU figures; the kernels' interpreter is not worth timing")
    path = None if args.no_save else args.out or default_path(device)
    results = Results(path, device, {})
    try:
        measured = ceilings(device, args.quick)
    except OSError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    for name, rates in measured.items():
        results.add(figure_of(rates, part="ceilings", name=name, unit=UNITS[name], params={}))
    results.limits.update({figure.name: figure.p50 for figure in results.figures})
    for less, more in (("tf32", "fp32"), ("bf16", "tf32")):  # a CPU may be slower at less precision: it can use more
        results.limits[less] = max(results.limits[less], results.limits[more])
    failed = 0
    for name, flags in given.items():
        try:
            importlib.import_module(f"benchmarks.parts.{name}").run(flags, results)
        except Exception as error:  # one part's failure must not cost the others
            if len(given) == 1:
                raise
            failed += 1
            results.missing(name, "all", reason(error))
        release(device)
    if path is not None:
        print(f"wrote {path}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measurements beside their limits. Several parts may be named: each flag is for the parts that have it.",
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="|".join([*PARTS, "all", "report", "compare"]))

    for name, help in PARTS.items():
        part = _common(parts.add_parser(name, help=help, description=help))
        importlib.import_module(f"benchmarks.parts.{name}").add_flags(part)
    _common(parts.add_parser("all", help="every part above, in that order"))
    report.add_flags(parts.add_parser("report", help="the README's table and plots, from results files alone"))
    compare.add_flags(parts.add_parser("compare", help="did a figure fall by more than its noise allows?"))
    return parser


def _part(name: str) -> argparse.ArgumentParser:
    parser = _common(argparse.ArgumentParser(prog=f"python -m benchmarks {name}"))
    importlib.import_module(f"benchmarks.parts.{name}").add_flags(parser)
    return parser


def _several(names: list[str], words: list[str]) -> dict[str, argparse.Namespace]:
    """Each part's flags. Words that follow a flag are its own; one that no part has is an error."""
    parsers = {name: _part(name) for name in names}
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not flags:
            flags.append([])
        flags[-1].append(word)
    known = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    given: dict[str, list[str]] = {name: [] for name in names}
    for flag in flags:
        takers = [name for name in names if flag[0].partition("=")[0] in known[name]]
        if not takers:
            _parser().error(f"{' '.join(flag)}: none of {', '.join(names)} has this flag")
        for name in takers:
            given[name] += flag
    return {name: parser.parse_args(given[name]) for name, parser in parsers.items()}


def _allow_recompiling() -> None:
    """Each contender recompiles shared code; beyond dynamo's default limit of 8 the last ones would silently run eager."""
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(1 << 16, getattr(config, limit)))


def _common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (default: the part's own)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, few rounds")
    parser.add_argument(
        "--out", type=Path, help="results file, appended to (default: benchmarks/results/DATE-DEVICE.jsonl)"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser


def _again(args: Any) -> list[str]:
    """The common flags that were given, for a part's own parser."""
    words = ["--device", args.device]
    words += ["--repeats", str(args.repeats)] if args.repeats else []
    return words + (["--quick"] if args.quick else [])


if __name__ == "__main__":
    sys.exit(main())
