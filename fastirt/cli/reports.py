"""`fastirt report` and `fastirt env`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastirt.cli.parser import Command, Parser


def _add_report(commands: Any) -> Parser:
    report = commands.add_parser("report", help="print a table of several runs", allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--sort", metavar="COLUMN", help="sort by this column of the table, largest first")
    return report


def _add_env(commands: Any) -> Parser:
    return commands.add_parser("env", help="print versions and hardware for a bug report")


def _report(args: dict[str, Any]) -> int:
    from fastirt.retrieval.compare_runs import compare_runs

    print(compare_runs(args["runs"], args["sort"]))
    return 0


def _env(_: dict[str, Any]) -> int:
    from fastirt.env import report

    print(report())
    return 0


COMMANDS = {"report": Command(_add_report, _report), "env": Command(_add_env, _env)}
