"""Metrics as files and tables, beside the published rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

from fastirt.atomic import replacing
from fastirt.errors import UserError


class Published(NamedTuple):
    """Recall@K in per cent at the data set's four ranks; only the first where no more is known."""

    source: str
    method: str
    model: str
    recalls: tuple[float, ...]


PAPER, PUBLIC = "El-Nouby et al. 2021", "jhgan00/image-retrieval-transformers"
DECIMALS = {PAPER: 1, PUBLIC: 2}  # as printed
SMALL, DISTILLED = "DeiT-S", "DeiT-S distilled"
TIMM_NAMES = {"deit_small_patch16_224": SMALL, "deit_small_distilled_patch16_224": DISTILLED}
PUBLISHED_RANKS = {"sop": (1, 10, 100, 1000), "cub200": (1, 2, 4, 8), "inshop": (1, 10, 20, 30)}
PUBLISHED: dict[str, list[Published]] = {
    "sop": [
        Published(PAPER, "irt-o", SMALL, (52.8,)),
        Published(PAPER, "irt-l", SMALL, (83.0,)),
        Published(PAPER, "irt-r", SMALL, (84.0, 93.6, 97.2, 99.1)),
        Published(PAPER, "irt-r", DISTILLED, (84.2, 93.7, 97.3, 99.1)),
        Published(PUBLIC, "irt-o", SMALL, (53.12, 68.96, 81.60, 94.09)),
        Published(PUBLIC, "irt-l", SMALL, (83.56, 93.29, 97.23, 99.03)),
        Published(PUBLIC, "irt-r", SMALL, (82.67, 92.73, 96.69, 98.80)),
        Published(PUBLIC, "irt-r", DISTILLED, (82.70, 92.85, 96.92, 98.86)),
    ],
    "cub200": [
        Published(PAPER, "irt-o", SMALL, (58.5,)),
        Published(PAPER, "irt-l", SMALL, (74.2,)),
        Published(PAPER, "irt-r", SMALL, (74.7, 82.9, 89.3, 93.3)),
        Published(PAPER, "irt-r", DISTILLED, (76.6, 85.0, 91.1, 94.3)),
        Published(PUBLIC, "irt-o", SMALL, (58.68, 71.30, 80.96, 88.18)),
        Published(PUBLIC, "irt-l", SMALL, (73.68, 82.58, 88.77, 92.71)),
        Published(PUBLIC, "irt-r", SMALL, (73.73, 82.91, 89.30, 93.35)),
        Published(PUBLIC, "irt-r", DISTILLED, (76.55, 85.26, 90.92, 94.65)),
    ],
    "inshop": [
        Published(PAPER, "irt-o", SMALL, (31.3,)),
        Published(PAPER, "irt-l", SMALL, (90.3,)),
        Published(PAPER, "irt-r", SMALL, (91.5, 98.1, 98.7, 99.0)),
        Published(PAPER, "irt-r", DISTILLED, (91.9, 98.1, 98.7, 98.9)),
        Published(PUBLIC, "irt-o", SMALL, (31.28, 57.03, 64.20, 68.28)),
        Published(PUBLIC, "irt-l", SMALL, (93.09, 98.28, 98.74, 99.02)),
        Published(PUBLIC, "irt-r", SMALL, (90.47, 97.97, 98.61, 98.92)),
        Published(PUBLIC, "irt-r", DISTILLED, (90.66, 98.16, 98.68, 98.99)),
    ],
}


def table(metrics: dict[str, Any], dataset: str, method: str, model: str, recipe: str) -> str:
    """This run's row, and the published rows of the data set where there are any, aligned for a terminal (Markdown).

    Those of the same method and model come first, the recipe's own source before the other. Published figures keep their decimals.
    """
    names = [name for name in metrics if name.startswith("recall@")] + ["map@r", "r_precision"]
    rows = [[f"this run ({recipe})", method, model, *(f"{100 * metrics[name]:.2f}" for name in names)]]
    own = PUBLIC if recipe == "unofficial" else PAPER
    comparable = (method, TIMM_NAMES.get(model.partition(".")[0], model))
    for row in sorted(
        PUBLISHED.get(dataset, []), key=lambda row: ((row.method, row.model) != comparable, row.source != own)
    ):
        known = {
            f"recall@{k}": f"{value:.{DECIMALS[row.source]}f}"
            for k, value in zip(PUBLISHED_RANKS[dataset], row.recalls)
        }
        rows.append([row.source, row.method, row.model, *(known.get(name, "") for name in names)])
    text = markdown([dataset, "method", "model", *(f"{name} %" for name in names)], rows)
    notes = [f"{metrics['queries']:,} queries, {metrics['gallery']:,} gallery images"]
    notes += [f"{metrics['unmatched']:,} queries without a match left out"] if metrics.get("unmatched") else []
    notes += [f"{metrics['bad']:,} unreadable images left out"] if metrics.get("bad") else []
    return f"{text}\n{'; '.join(notes)}"


def read_metrics(folder: Path, missing_is_empty: bool = False) -> dict[str, Any]:
    metrics = read_json(folder / "metrics.json")
    if metrics is None and missing_is_empty:
        return {}
    if metrics is None:
        raise UserError(f"{folder}: no metrics.json there: is the run finished?")
    if not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise UserError(f"{folder / 'metrics.json'}: holds other things than numbers: fastirt did not write it")
    return metrics


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; numbers to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(2, *(len(row[i]) for row in cells)) for i in range(len(header))]  # the rule needs two characters
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)) + " |"

    rule = "| " + " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).isdigit()


def read_json(path: Path) -> Optional[dict[str, Any]]:
    """The object in a file; None where there is no such file. Raises UserError for anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no names and values: fastirt did not write it")
    return tree
