"""`fastirt COMMAND`: the flags and `--help` of training and evaluation are generated from the config tree."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import typing
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional, Sequence

from fastirt.config import METHODS, RECIPES, Config
from fastirt.errors import one_line

TRAIN = """Train and evaluate. Presets fill what is not given: --method and --recipe choose them; with neither, the defaults are
those of the public re-implementation (recipe `unofficial`), and its command lines keep their meaning."""
EVALUATE = """Evaluate a run (its folder), a weights file, or, with neither, the model off the shelf (IRT_O)."""


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


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
        if (told := one_line(error)) is None:
            raise
        print(f"fastirt {command}: error: {told}", file=sys.stderr)
        return 2


def build_parser() -> Parser:
    parser = Parser(prog="fastirt", description="Train vision transformers for image retrieval.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train, then evaluate",
        description=TRAIN,
        allow_abbrev=False,
        usage="fastirt train [--method M] [--recipe R] [--dataset D] [--data-path PATH] [options]",
    )
    add_config(train)

    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a run, a weights file or IRT_O",
        description=EVALUATE,
        allow_abbrev=False,
        usage="fastirt evaluate [RUN] [--weights FILE] [--dataset D] [--data-path PATH] [options]",
    )
    evaluate.add_argument("run", nargs="?", type=Path, help="run folder, or a file of weights")
    add_config(evaluate)

    pack = commands.add_parser(
        "pack", help="store a data set's pictures, resized once, in one file", allow_abbrev=False
    )
    pack.add_argument("out", type=Path, help="file to write")
    pack.add_argument(
        "--recipe",
        choices=RECIPES,
        default=argparse.SUPPRESS,
        help="resize as this recipe does (default: as `fastirt train` would)",
    )
    for group, names in (("data", ("dataset", "data_path")), ("input", ("input_size", "resize", "resize_size"))):
        for field in dataclasses.fields(getattr(Config(), group)):
            if field.name in names:
                add_field(pack, Config(), group, field)
    pack.add_argument("--quality", type=int, default=95, help="JPEG quality (default: %(default)s)")
    pack.add_argument(
        "--subsampling", choices=("4:4:4", "4:2:2", "4:2:0"), default="4:4:4", help="JPEG chroma (default: %(default)s)"
    )
    pack.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")

    demo = commands.add_parser("demo", help="draw the demo set: products rendered from a seed", allow_abbrev=False)
    demo.add_argument("out", type=Path, help="folder to write")
    demo.add_argument("--classes", type=int, default=225, help="(default: %(default)s)")
    demo.add_argument("--views", type=int, default=12, help="pictures per class (default: %(default)s)")
    demo.add_argument("--width", type=int, default=64, help="pixels (default: %(default)s)")
    demo.add_argument("--height", type=int, default=64, help="pixels (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    demo.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")

    report = commands.add_parser("report", help="put the metrics of several runs side by side", allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    commands.add_parser("env", help="print what a bug report needs")
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """One flag per config field, grouped by component; a flag that is not given leaves no trace in the result."""
    presets = parser.add_argument_group("Presets")
    presets.add_argument(
        "--method",
        choices=METHODS,
        default=argparse.SUPPRESS,
        help="irt-o: off the shelf; irt-l: contrastive; irt-r: contrastive + KoLeo",
    )
    presets.add_argument(
        "--recipe", choices=RECIPES, default=argparse.SUPPRESS, help="the paper's, or the public re-implementation's"
    )
    config = Config()
    for name, part in config.parts().items():
        group = parser.add_argument_group(type(part).__doc__)
        for field in dataclasses.fields(part):
            add_field(group, config, name, field)


def add_field(group: Any, config: Config, part: str, field: dataclasses.Field) -> None:
    """The flag of one config field, typed after its annotation."""
    hint = typing.get_type_hints(type(getattr(config, part)))[field.name]
    flag, default = f"--{field.name.replace('_', '-')}", getattr(getattr(config, part), field.name)
    words: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
    if default not in (None, ()):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        words["help"] += f" ({shown})".replace("%", "%%")
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **words)
        return
    inner = (
        [a for a in typing.get_args(hint) if a is not type(None)] if typing.get_origin(hint) is typing.Union else [hint]
    )
    kind = inner[0]
    if typing.get_origin(kind) is tuple:
        kind, words["nargs"] = typing.get_args(kind)[0], "+"
    if field.name == "resume":
        words.update(nargs="?", const="")
    words["metavar"] = "FILE" if field.name == "weights" else {int: "N", float: "X", str: "S"}[kind]
    if field.metadata["choices"]:
        words["choices"] = field.metadata["choices"]
        del words["metavar"]
    if "nargs" not in words and type(None) in typing.get_args(hint):
        kind = _or_none(kind)
    flags = (flag, *(f"--{other}" for other in field.metadata.get("aliases", ())))
    group.add_argument(*flags, type=kind, dest=field.name, **words)


def _or_none(kind: type) -> Callable[[str], Any]:
    """`none` takes back what a preset or a stored run has set."""

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # for argparse's own messages
    return parse


def given(args: dict[str, Any]) -> dict[str, Any]:
    """Lists to tuples, as the config has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}


def _train(args: dict[str, Any]) -> int:
    from fastirt.launch import as_rank
    from fastirt.run import train

    return as_rank("train", lambda ranks: train(given(args), ranks))


def _evaluate(args: dict[str, Any]) -> int:
    from fastirt.launch import as_rank
    from fastirt.run import evaluate_model

    run = args.pop("run")
    return as_rank("evaluate", lambda ranks: evaluate_model(run, given(args), ranks))


def _pack(args: dict[str, Any]) -> int:
    from fastirt.catalog import load_catalog
    from fastirt.input.pack import pack
    from fastirt.presets import resolve

    own = {name: args.pop(name) for name in ("out", "quality", "subsampling", "workers")}
    config = resolve(given(args))
    catalog = load_catalog(config.data.dataset, config.data.data_path)
    pack(catalog, own.pop("out"), resize=config.input.resize, resize_size=config.input.resize_size, **own)
    return 0


def _demo(args: dict[str, Any]) -> int:
    from fastirt.demo.generate import generate

    print(generate(args.pop("out"), **args))
    return 0


def _report(args: dict[str, Any]) -> int:
    from fastirt.retrieval.report import compare_runs

    print(compare_runs(args["runs"]))
    return 0


def _env(_: dict[str, Any]) -> int:
    from fastirt.env import report

    print(report())
    return 0


COMMANDS = {"train": _train, "evaluate": _evaluate, "pack": _pack, "demo": _demo, "report": _report, "env": _env}
