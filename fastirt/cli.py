"""`fastirt COMMAND`: the flags and `--help` of training and evaluation are generated from the config tree."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn, Optional, Sequence

from fastirt import __version__
from fastirt.config.flags import FOOTNOTE, add_config, add_field, add_presets, given, suggestion
from fastirt.config.options import Config
from fastirt.errors import user_message

log = logging.getLogger("fastirt")

TRAIN = f"""Train and evaluate. Presets fill what is not given: --method and --recipe choose them; with neither, the defaults are
those of the public re-implementation (recipe `unofficial`), and its command lines keep their meaning. {FOOTNOTE}"""
EVALUATE = """Evaluate a run (its folder), a weights file, or, with neither, the model off the shelf (IRT_O). Of a run or a model
file, what is not given is as the run had it; else the defaults are those below."""


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    commands: argparse._SubParsersAction

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """Unknown flags are an error of the command that they were given to, with what may have been meant."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self.commands.choices.get(getattr(parsed, "command", None), self)
            known = [name for action in parser._actions for name in action.option_strings]
            flags = [word for word in unknown if word.startswith("-")] or unknown[:1]
            meant = suggestion(flags[0], known)
            parser.error(f"unknown: {' '.join(flags)}" + (f"; did you mean {meant}?" if meant else ""))
        return parsed


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point of the `fastirt` command; returns its exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("fastirt").setLevel(logging.INFO)
    args = vars(build_parser().parse_args(argv))
    command = args.pop("command")
    try:
        return COMMANDS[command](args)
    except KeyboardInterrupt:
        print(f"fastirt {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (told := user_message(error)) is None:
            raise
        print(f"fastirt {command}: error: {told}", file=sys.stderr)
        return 2


def build_parser() -> Parser:
    parser = Parser(prog="fastirt", description="Train vision transformers for image retrieval.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastirt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    parser.commands = commands

    train = commands.add_parser(
        "train",
        help="train, then evaluate",
        description=TRAIN,
        allow_abbrev=False,
        usage="fastirt train [--method M] [--recipe R] [--dataset D] [--data-path PATH] [options]",
    )
    add_config(train, "train")

    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a run, a weights file or IRT_O",
        description=EVALUATE,
        allow_abbrev=False,
        usage="fastirt evaluate [RUN] [--weights FILE] [--dataset D] [--data-path PATH] [options]",
    )
    evaluate.add_argument("run", nargs="?", type=Path, help="run folder, or a file of weights")
    add_config(evaluate, "evaluate")

    pack = commands.add_parser("pack", help="store a data set's images, resized once, in one file", allow_abbrev=False)
    pack.add_argument("out", type=Path, help="file to write")
    add_presets(pack, "pack")
    for group, names in (
        ("data", ("dataset", "data_path")),
        ("input", ("input_size", "resize", "resize_size", "orientation")),
    ):
        for field in dataclasses.fields(getattr(Config(), group)):
            if field.name in names:
                add_field(pack, "pack", group, field)
    pack.add_argument("--quality", type=int, default=95, help="JPEG quality (default: %(default)s)")
    pack.add_argument(
        "--subsampling", choices=("4:4:4", "4:2:2", "4:2:0"), default="4:4:4", help="JPEG chroma (default: %(default)s)"
    )
    pack.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")

    demo = commands.add_parser("demo", help="draw the demo set: products rendered from a seed", allow_abbrev=False)
    demo.add_argument("out", type=Path, help="folder to write")
    demo.add_argument("--classes", type=int, default=225, help="(default: %(default)s)")
    demo.add_argument("--views", type=int, default=12, help="images per class (default: %(default)s)")
    demo.add_argument("--width", type=int, default=64, help="pixels (default: %(default)s)")
    demo.add_argument("--height", type=int, default=64, help="pixels (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    demo.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")

    report = commands.add_parser("report", help="put the metrics of several runs side by side", allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--sort", metavar="COLUMN", help="by a column, best or largest first; its name as in the table")
    commands.add_parser("env", help="print what a bug report needs")
    return parser


def _train(args: dict[str, Any]) -> int:
    from fastirt.commands import train
    from fastirt.distributed.launch import as_rank

    return as_rank("train", lambda ranks: train(given(args), ranks))


def _evaluate(args: dict[str, Any]) -> int:
    from fastirt.commands import evaluate_model
    from fastirt.distributed.launch import as_rank

    run = args.pop("run")
    return as_rank("evaluate", lambda ranks: evaluate_model(run, given(args), ranks))


def _pack(args: dict[str, Any]) -> int:
    from fastirt.config.presets import resolve
    from fastirt.datasets import load_dataset
    from fastirt.images.pack import pack
    from fastirt.images.packed_store import PackedStore

    own = {name: args.pop(name) for name in ("out", "quality", "subsampling", "workers")}
    config = resolve(given(args), "pack")
    log.info("pack: %s", config.describe_input())
    catalog = load_dataset(config.data.dataset, config.data.data_path, training=None)
    how = dict(resize=config.input.resize, resize_size=config.input.resize_size, orientation=config.input.orientation)
    out = pack(catalog, own.pop("out"), **how, **own)
    store = PackedStore.open(out)
    log.info(
        "pack: wrote %s: %s images, %s of them unreadable, %.1f MB",
        out,
        f"{len(store):,}",
        f"{len(store.bad):,}",
        out.stat().st_size / 1e6,
    )
    return 0


def _demo(args: dict[str, Any]) -> int:
    from fastirt.demo.generate import generate

    print(generate(args.pop("out"), **args))
    return 0


def _report(args: dict[str, Any]) -> int:
    from fastirt.retrieval.compare_runs import compare_runs

    print(compare_runs(args["runs"], args["sort"]))
    return 0


def _env(_: dict[str, Any]) -> int:
    from fastirt.env import report

    print(report())
    return 0


COMMANDS = {"train": _train, "evaluate": _evaluate, "pack": _pack, "demo": _demo, "report": _report, "env": _env}
