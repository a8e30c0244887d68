"""Metrics as files and tables, beside published results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional, Sequence

from fastirt.atomic import atomic_write
from fastirt.config.run_files import RunFiles
from fastirt.errors import UserError
from fastirt.retrieval.metrics.summary import HIGH, LOW, WITH_INTERVAL
from fastirt.retrieval.published_results import DECIMALS, PAPER, PUBLIC, PUBLISHED, PUBLISHED_RANKS, TIMM_NAMES

IN_PERCENT = {"map": "mAP", "mrr": "MRR", "minp": "mINP"}  # name in metrics.json and in the notes


def table(metrics: dict[str, Any], dataset: str, method: str, model: str, recipe: str, average: str = "query") -> str:
    """A Markdown table with the row of this run and the published rows of the data set, and notes.

    Published rows of the same method and model come first, then those of the recipe's source. The
    notes hold counts, and what else of the metrics is there. average: what metrics are means over.
    """
    names = [name for name in metrics if name.startswith("recall@")] + ["map@r", "r_precision"]
    rows = [[f"this run ({recipe})", method, model, *(f"{100 * metrics[name]:.2f}" for name in names)]]
    source = PUBLIC if recipe == "unofficial" else PAPER
    comparable = (method, TIMM_NAMES.get(model.partition(".")[0], model))
    for row in sorted(
        PUBLISHED.get(dataset, []), key=lambda row: ((row.method, row.model) != comparable, row.source != source)
    ):
        known = {
            f"recall@{k}": f"{value:.{DECIMALS[row.source]}f}"
            for k, value in zip(PUBLISHED_RANKS[dataset], row.recalls)
        }
        rows.append([row.source, row.method, row.model, *(known.get(name, "") for name in names)])
    text = markdown([dataset, "method", "model", *(f"{name} %" for name in names)], rows)
    notes = [f"{metrics['queries']:,} queries, {metrics['gallery']:,} gallery images"]
    notes += [f"{metrics['unmatched']:,} queries without a match not counted"] if metrics.get("unmatched") else []
    notes += [f"{metrics['bad']:,} unreadable images skipped"] if metrics.get("bad") else []
    notes += ["means over classes"] if average == "class" else []
    lines = [text, "; ".join(notes)]
    intervals = [f"{name} {shown}" for name in WITH_INTERVAL if (shown := interval(metrics, name))]
    lines += [f"95 % intervals: {', '.join(intervals)} %"] if intervals else []
    others = [f"{label} {100 * metrics[name]:.2f} %" for name, label in IN_PERCENT.items() if name in metrics]
    others += [f"median rank {metrics['median_rank']:g}"] if "median_rank" in metrics else []
    return "\n".join([*lines, *([", ".join(others)] if others else [])])


def interval(metrics: dict[str, Any], name: str) -> str:
    """The 95 % interval of a metric in percent, such as `62.13-66.40`; empty without one."""
    if LOW + name not in metrics or HIGH + name not in metrics:
        return ""
    return f"{100 * metrics[LOW + name]:.2f}-{100 * metrics[HIGH + name]:.2f}"


def read_metrics(folder: Path, missing_is_empty: bool = False) -> dict[str, Any]:
    """The metrics of a run. Raises UserError if they are unreadable or, by default, missing."""
    metrics = read_json(RunFiles(folder).metrics)
    if metrics is None and missing_is_empty:
        return {}
    if metrics is None:
        raise UserError(f"{folder}: no metrics.json there: finish the run")
    if not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise UserError(f"{RunFiles(folder).metrics}: holds values other than numbers: not written by fastirt")
    return metrics


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write JSON atomically. Raises UserError."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    cells = [list(header), *map(list, rows)]
    # The rule below the header needs two characters.
    widths = [max(2, *(len(row[i]) for row in cells)) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)) + " |"

    rule = "| " + " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).isdigit()


def read_json(path: Path) -> Optional[dict[str, Any]]:
    """The object in a JSON file, or None if the file is missing. Raises UserError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no JSON object: not written by fastirt")
    return tree
