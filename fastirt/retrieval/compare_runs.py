"""`fastirt report`: runs side by side, with a column for whatever tells them apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

from fastirt.config import Config, flatten
from fastirt.errors import UserError
from fastirt.retrieval.report import markdown, read_json, read_metrics

Options = dict[str, Any]  # of a run, by bare name; empty for what has no config.json


def _dataset(options: Options) -> str:
    where = os.path.basename(options["data_path"].rstrip("/"))
    split = " (val)" if options["eval_split"] == "val" else ""
    return (f"{options['dataset']} {where}" if options["dataset"] in ("folder", "csv") else options["dataset"]) + split


def _trains(name: str) -> Callable[[Options], str]:
    """An option that says nothing of a run without training."""
    return lambda options: _text(options[name]) if options["max_iter"] else ""


def _plain(name: str) -> Callable[[Options], str]:
    return lambda options: _text(options[name])


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Columns that are shown where runs differ in them.
COLUMNS: dict[str, Callable[[Options], str]] = {
    "data set": _dataset,
    "model": _plain("model"),
    "pooling": _plain("pooling"),
    "size": _plain("input_size"),
    "recipe": _plain("recipe"),
    "λ": _trains("lambda_reg"),
    "margin": _trains("margin"),
    "memory": _trains("memory_ratio"),
    "momentum": _trains("encoder_momentum"),
    "batch": _trains("batch_size"),
    "m": _trains("m"),
    "lr": _trains("lr"),
    "steps": _plain("max_iter"),
    "seed": _plain("seed"),
}


def compare_runs(folders: Sequence[Path], sort: Optional[str] = None) -> str:
    """A Markdown table with one row a run folder: method, whatever tells the runs apart, and metrics in per cent.

    sort: the name of a column; numbers fall, text rises, and what has no value comes last. Raises UserError for a folder
    without metrics and for a column that is not there.
    """
    metrics = [read_metrics(folder) for folder in folders]
    options = [_options(folder) for folder in folders]
    values = {name: [value(o) if o else "" for o in options] for name, value in COLUMNS.items()}
    shown = [name for name in COLUMNS if len(set(values[name]) - {""}) > 1]
    ks = sorted({int(name.split("@")[1]) for found in metrics for name in found if name.startswith("recall@")})
    measured = [*(f"recall@{k}" for k in ks), "map@r"]
    methods = [_method(o, with_recipe="recipe" not in shown) for o in options]
    header = ["run", "method", *shown, *(f"{name} %" for name in measured)]
    rows = [
        [
            folder.resolve().name,
            methods[i],
            *(values[name][i] for name in shown),
            *(f"{100 * metrics[i][name]:.2f}" if name in metrics[i] else "" for name in measured),
        ]
        for i, folder in enumerate(folders)
    ]
    if sort is not None:
        rows = _sorted(rows, header, sort)
    return markdown(header, rows)


def _options(folder: Path) -> Options:
    tree = read_json(folder / "config.json")
    if not tree:
        return {}
    try:
        return flatten(Config.from_dict(tree["config"]).to_dict())
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: made by another version of fastirt ({error})") from error


def _method(options: Options, with_recipe: bool) -> str:
    if not options:
        return ""
    return f"{options['method']} ({options['recipe']})" if with_recipe else options["method"]


def _sorted(rows: list[list[str]], header: list[str], sort: str) -> list[list[str]]:
    names = [name.removesuffix(" %").lower() for name in header]
    wanted = {"lambda": "λ", "dataset": "data set"}.get(sort.lower(), sort.lower().removesuffix("%").strip())
    if wanted not in names:
        raise UserError(f"--sort {sort}: no such column: use one of {', '.join(names)}")
    column = names.index(wanted)
    filled = [row for row in rows if row[column]]
    try:
        filled.sort(key=lambda row: -float(row[column]))
    except ValueError:
        filled.sort(key=lambda row: row[column])
    return filled + [row for row in rows if not row[column]]
