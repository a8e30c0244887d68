"""`fastirt report` and `fastirt env`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastirt.cli.parser import Command, Parser
from fastirt.errors import UserError


def _add_report(commands: Any) -> Parser:
    report = commands.add_parser(
        "report", help="print a table of several runs, or write a page about them", allow_abbrev=False
    )
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--sort", metavar="COLUMN", help="sort by this column of the table, largest first")
    report.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page instead: metrics, curves, queries with their neighbors, failures, doubles, hubs, a map",
    )
    report.add_argument(
        "--data-path", metavar="PATH", help="with --html: where the runs' data set is now, if it was moved"
    )
    return report


def _add_env(commands: Any) -> Parser:
    return commands.add_parser("env", help="print versions and hardware for a bug report")


def _report(args: dict[str, Any]) -> int:
    if args["html"] is not None:
        from fastirt.datasets.records import printable
        from fastirt.pages.report.page import write_report_page

        size = write_report_page(args["html"], args["runs"], sort=args["sort"], data_path=args["data_path"])
        print(f"{printable(str(args['html']))}: {size / 1e6:.1f} MB, opens in any browser")
        return 0
    from fastirt.retrieval.compare_runs import compare_runs

    if args["data_path"] is not None:
        raise UserError("--data-path: for the images of a page: pass --html FILE too")
    print(compare_runs(args["runs"], args["sort"]))
    return 0


def _env(_: dict[str, Any]) -> int:
    from fastirt.env import report

    print(report())
    return 0


COMMANDS = {"report": Command(_add_report, _report), "env": Command(_add_env, _env)}
