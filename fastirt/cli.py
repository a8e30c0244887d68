"""The command line, `fastirt COMMAND`; flags and help come from the config tree."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn, Optional, Sequence

from fastirt import __version__
from fastirt.config.flags import FOOTNOTE, add_config, add_field, add_presets, given, suggestion
from fastirt.config.options import SUBSAMPLINGS, Config
from fastirt.errors import user_message

log = logging.getLogger("fastirt")

TRAIN = (
    "Train and evaluate. --method and --recipe choose the defaults of other flags. With neither, they are those of the "
    "public re-implementation (recipe `unofficial`), so that its command lines keep their meaning. " + FOOTNOTE
)
EVALUATE = (
    "Evaluate a run (its folder), a file of weights, or, with neither, the model off the shelf (IRT_O). Flags default "
    "to those of the run or model file, else to the values below."
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    commands: argparse._SubParsersAction

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """Parse; the command of an unknown flag reports it, with a suggestion."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self.commands.choices.get(getattr(parsed, "command", None), self)
            known = [name for action in parser._actions for name in action.option_strings]
            flags = [word for word in unknown if word.startswith("-")] or unknown[:1]
            similar = suggestion(flags[0], known)
            parser.error(f"unknown: {' '.join(flags)}" + (f"; did you mean {similar}?" if similar else ""))
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
        if (message := user_message(error)) is None:
            raise
        print(f"fastirt {command}: error: {message}", file=sys.stderr)
        return 2


def build_parser() -> Parser:
    """The parser of all commands."""
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
    _add_per_query(train)
    add_config(train, "train")

    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a run, a file of weights or IRT_O",
        description=EVALUATE,
        allow_abbrev=False,
        usage="fastirt evaluate [RUN] [--weights FILE] [--dataset D] [--data-path PATH] [options]",
    )
    evaluate.add_argument("run", nargs="?", type=Path, help="run folder or file of weights")
    _add_per_query(evaluate)
    add_config(evaluate, "evaluate")

    pack = commands.add_parser(
        "pack", help="resize a data set's images once and store them in one file", allow_abbrev=False
    )
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
    pack.add_argument("--subsampling", choices=SUBSAMPLINGS, default="4:4:4", help="JPEG chroma (default: %(default)s)")
    pack.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")

    demo = commands.add_parser("demo", help="draw the demo set of rendered products", allow_abbrev=False)
    demo.add_argument("out", type=Path, help="folder to write")
    demo.add_argument("--classes", type=int, default=225, help="number of products (default: %(default)s)")
    demo.add_argument("--views", type=int, default=12, help="images per product (default: %(default)s)")
    demo.add_argument("--width", type=int, default=64, help="of the images in pixels (default: %(default)s)")
    demo.add_argument("--height", type=int, default=64, help="of the images in pixels (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the drawings (default: %(default)s)")
    demo.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")

    report = commands.add_parser("report", help="print a table of several runs", allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--sort", metavar="COLUMN", help="sort by this column of the table, largest first")
    commands.add_parser("env", help="print versions and hardware for a bug report")
    return parser


def _add_per_query(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--per-query",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="write a row per query of the evaluation to this .csv or .parquet file: what it found first, and its AP",
    )


def _train(args: dict[str, Any]) -> int:
    from fastirt.distributed.launch import as_rank

    per_query = args.pop("per_query", None)

    def work(ranks: Any) -> int:
        from fastirt.commands import train  # imports Inductor, which reads its settings only then

        return train(given(args), ranks, per_query)

    return as_rank("train", work)


def _evaluate(args: dict[str, Any]) -> int:
    from fastirt.commands import evaluate_model
    from fastirt.distributed.launch import as_rank

    run, per_query = args.pop("run"), args.pop("per_query", None)
    return as_rank("evaluate", lambda ranks: evaluate_model(run, given(args), ranks, per_query))


def _pack(args: dict[str, Any]) -> int:
    from fastirt.config.presets import resolve
    from fastirt.datasets import load_dataset
    from fastirt.images.pack import pack
    from fastirt.images.packed_store import PackedStore

    options = {name: args.pop(name) for name in ("out", "quality", "subsampling", "workers")}
    config = resolve(given(args), "pack")
    log.info("pack: %s", config.describe_input())
    catalog = load_dataset(config.data.dataset, config.data.data_path, training=None)
    out = pack(
        catalog,
        options["out"],
        resize=config.input.resize,
        resize_size=config.input.resize_size,
        quality=options["quality"],
        subsampling=options["subsampling"],
        orientation=config.input.orientation,
        workers=options["workers"],
    )
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
