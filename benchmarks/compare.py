"""`compare A B`: did any figure fall from A to B by more than its own noise allows?"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import key, read

SMALLEST = 0.02  # relative; a smaller fall never counts
INFORMATION = ("ceilings",)  # parts that measure the machine, not fastirt


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="results before (JSON lines)")
    parser.add_argument("b", type=Path, help="results after")


def fall(before: dict[str, Any], after: dict[str, Any]) -> float:
    """How much worse the median became, relative to before; negative if it became better."""
    old, new = before["p50"], after["p50"]
    if not (math.isfinite(old) and math.isfinite(new)):
        return math.inf
    worse = new - old if before.get("better") == "lower" else old - new
    return worse / abs(old) if old else 0.0


def allowed(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The relative fall that noise explains: half of p20-p80 of both rows, added in quadrature."""
    widths = [abs(row["p80"] - row["p20"]) / 2 / abs(row["p50"]) if row["p50"] else 0.0 for row in (before, after)]
    return max(SMALLEST, math.hypot(*widths))


def main(args: argparse.Namespace) -> int:
    """Exit code 0: nothing fell; 1: a figure fell; 2: there is nothing to compare."""
    try:
        old, new = ({key(row): row for row in read([path]) if "not_run" not in row} for path in (args.a, args.b))
    except ValueError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    common = [name for name in old if name in new]
    if not any(old[name]["part"] not in INFORMATION for name in common):
        print(
            f"compare: error: {args.a} and {args.b} have no figure in common (part, name, sizes and device)",
            file=sys.stderr,
        )
        return 2
    fallen = 0
    for name in common:
        before, after = old[name], new[name]
        change, noise = -fall(before, after), allowed(before, after)
        verdict = "" if change >= -noise else "information only" if before["part"] in INFORMATION else "FELL"
        fallen += verdict == "FELL"
        print(
            f"{_label(before)}  {before['p50']:.4g} -> {after['p50']:.4g} {before['unit']}  {100 * change:+.1f} %  "
            f"(noise allows {100 * noise:.1f} %)  {verdict}".rstrip()
        )
    for name in old:
        if name not in new and old[name]["part"] not in INFORMATION:
            print(f"{_label(old[name])}  is missing in {args.b}")
    print(f"{len(common)} figures compared, {fallen} fell")
    return 1 if fallen else 0


def _label(row: dict[str, Any]) -> str:
    return f"{row['part']:10} {row['name']:26} {json.dumps(row['params'])}"
