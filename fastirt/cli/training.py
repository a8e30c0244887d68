"""`fastirt train` and `fastirt evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Optional

from fastirt.cli.parser import Command, Parser
from fastirt.config.flags import FOOTNOTE, add_config, given
from fastirt.config.run_file import with_run_file

TRAIN = (
    "Train and evaluate. --method and --recipe choose the defaults of other flags. With neither, they are those of the "
    "public re-implementation (recipe `unofficial`), so that its command lines keep their meaning. " + FOOTNOTE
)
EVALUATE = (
    "Evaluate a run (its folder), a file of weights, or, with neither, the model off the shelf (IRT_O). Flags default "
    "to those of the run or model file, else to the values below."
)


def _add_train(commands: Any) -> Parser:
    train = commands.add_parser(
        "train",
        help="train, then evaluate",
        description=TRAIN,
        allow_abbrev=False,
        usage="fastirt train [--method M] [--recipe R] [--dataset D] [--data-path PATH] [options]",
    )
    _add_files(train, "train")
    add_config(train, "train")
    return train


def _add_evaluate(commands: Any) -> Parser:
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a run, a file of weights or IRT_O",
        description=EVALUATE,
        allow_abbrev=False,
        usage="fastirt evaluate [RUN] [--weights FILE] [--dataset D] [--data-path PATH] [options]",
    )
    evaluate.add_argument("run", nargs="?", type=Path, help="run folder or file of weights")
    _add_files(evaluate, "evaluate")
    add_config(evaluate, "evaluate")
    return evaluate


def _add_files(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="run file (YAML): flags by name, below those given here, such as the run.yaml of a run"
        + (" (options of training are left out)" if command == "evaluate" else ""),
    )
    parser.add_argument(
        "--per-query",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="write a row per query of the evaluation to this .csv or .parquet file: what it found first, and its AP",
    )


def _train(args: dict[str, Any]) -> int:
    from fastirt.distributed.launch import as_rank

    flags, per_query = _flags(args, "train")

    def work(ranks: Any) -> int:
        from fastirt.commands import train  # imports Inductor, which reads its settings only then

        return train(flags, ranks, per_query)

    return as_rank("train", work)


def _evaluate(args: dict[str, Any]) -> int:
    from fastirt.commands import evaluate_model
    from fastirt.distributed.launch import as_rank

    run = args.pop("run")
    flags, per_query = _flags(args, "evaluate", own_weights=run is not None)
    return as_rank("evaluate", lambda ranks: evaluate_model(run, flags, ranks, per_query))


def _flags(args: dict[str, Any], command: str, own_weights: bool = False) -> tuple[dict[str, Any], Optional[Path]]:
    """(flags, those of --config below them; --per-query). Raises UserError.

    own_weights: weights and method are those of the model that the command names.
    """
    config = args.pop("config", None)
    flags = with_run_file(config, given(args), command)
    if own_weights:
        flags = {name: flags[name] for name in flags if name in args or name not in ("weights", "method")}
    per_query = flags.pop("per_query", None)
    return flags, per_query and Path(per_query)


COMMANDS = {"train": Command(_add_train, _train), "evaluate": Command(_add_evaluate, _evaluate)}
