"""`fastirt sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastirt.cli.parser import Command, Parser

SWEEP = (
    "Train many settings of flags, by grid or at random, and measure each on validation classes that are held out of "
    "the training set: test images are never read. Results go to sweep.json, sweep.csv and sweep.html. Called again, "
    "it goes on where it was stopped."
)


def _add_sweep(commands: Any) -> Parser:
    sweep = commands.add_parser(
        "sweep", help="try settings of flags on held-out classes", description=SWEEP, allow_abbrev=False
    )
    sweep.add_argument("file", type=Path, metavar="SWEEP.yaml", help="what to try; see fastirt/tuning/README.md")
    sweep.add_argument(
        "--output-dir",
        metavar="OUT",
        help="folder of the results (default: output_dir of the file, else outputs/sweeps/NAME)",
    )
    sweep.add_argument("--retry-failed", action="store_true", help="run settings again that failed before")
    return sweep


def _sweep(args: dict[str, Any]) -> int:
    from fastirt.distributed.launch import as_rank

    def work(ranks: Any) -> int:
        from fastirt.tuning.run_sweep import run_sweep

        return run_sweep(args["file"], args["output_dir"], ranks, args["retry_failed"])

    return as_rank("sweep", work)


COMMANDS = {"sweep": Command(_add_sweep, _sweep)}
