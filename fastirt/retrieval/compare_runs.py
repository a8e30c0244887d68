"""`fastirt report`: a table of runs, with a column for each option in which they differ."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

from fastirt.config.options import TRAINING_OPTIONS, Config, RunConfig, flatten
from fastirt.config.run_files import RunFiles
from fastirt.errors import UserError
from fastirt.retrieval.metrics.summary import WITH_INTERVAL
from fastirt.retrieval.report import interval, markdown, read_json, read_metrics

Options = dict[str, Any]  # of a run, by field name; empty without config.json


def _dataset(options: Options) -> str:
    path = options["data_path"].rstrip("/")
    name = os.path.basename(path)
    if path.endswith(".csv"):
        name = f"{os.path.basename(os.path.dirname(path))}/{name}"
    split = " (val)" if options["eval_split"] == "val" else ""
    return (f"{options['dataset']} {name}" if options["dataset"] in ("folder", "csv") else options["dataset"]) + split


def _weights(options: Options) -> str:
    weights = options["weights"]
    return "/".join(Path(weights).parts[-2:]) if weights else "timm"


def _column(name: str) -> Callable[[Options], str]:
    """The cell of an option; empty for a training option of a run without training."""
    if name == "weights":
        return _weights
    if name in TRAINING_OPTIONS and name != "max_iter":
        return lambda options: _text(options[name]) if options["max_iter"] else ""
    return lambda options: _text(options[name])


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Names of the first columns; columns of other options that affect metrics follow under their names.
LABELS = {
    "model": "model",
    "weights": "weights",
    "pooling": "pooling",
    "input_size": "size",
    "recipe": "recipe",
    "lambda_reg": "λ",
    "margin": "margin",
    "memory_ratio": "memory",
    "encoder_momentum": "momentum",
    "batch_size": "batch",
    "m": "m",
    "lr": "lr",
    "max_iter": "steps",
    "seed": "seed",
    "momentum": "SGD momentum",
}
# Options without a column: shown elsewhere, or without effect on metrics beyond rounding.
SHOWN_ELSEWHERE = {"method", "dataset", "data_path", "eval_split", "rank"}
UNMEASURED = {"packed", "num_workers", "pin_mem", "cache", "max_bad", "loss_impl", "loss_precision", "engine"}
UNMEASURED |= {"memory_sharded", "eval_freq", "eval_batch_size", "search", *(f.name for f in fields(RunConfig))}


def _columns() -> dict[str, Callable[[Options], str]]:
    """All columns by name."""
    rest = [name for name in flatten(Config().to_dict()) if name not in {*LABELS, *SHOWN_ELSEWHERE, *UNMEASURED}]
    labels = LABELS | {name: name.replace("_", " ") for name in rest}
    return {"data set": _dataset} | {label: _column(name) for name, label in labels.items()}


def compare_runs(folders: Sequence[Path], sort: Optional[str] = None) -> str:
    """The table of `comparison` as Markdown. Raises UserError likewise."""
    return markdown(*comparison(folders, sort))


def comparison(folders: Sequence[Path], sort: Optional[str] = None) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row for each run with method, differing options, and metrics in percent.

    Args:
        folders: run folders; runs without metrics have empty cells.
        sort: name of a column to sort by: numbers descending, then text ascending, then empty
            cells.

    Raises:
        UserError: a folder holds no run, or `sort` is no column.
    """
    runs = [_read_run(folder) for folder in folders]
    options = [run_options for run_options, _ in runs]
    # Unfinished runs and runs without a test split have no metrics.
    metrics = [read_metrics(folder, missing_is_empty=bool(o)) for folder, o in zip(folders, options)]
    columns = _columns()
    values = {name: [value(o) if o else "" for o in options] for name, value in columns.items()}
    values["data set"] = _distinct_names(values["data set"], [digest for _, digest in runs])
    shown = [name for name in columns if len(set(values[name]) - {""}) > 1]
    ks = sorted({int(name.split("@")[1]) for row in metrics for name in row if name.startswith("recall@")})
    measured: dict[str, list[str]] = {}
    for metric in [*(f"recall@{k}" for k in ks), "map@r"]:
        measured[f"{metric} %"] = [f"{100 * row[metric]:.2f}" if metric in row else "" for row in metrics]
        intervals = [interval(row, metric) for row in metrics]
        if metric in WITH_INTERVAL and any(intervals):
            measured[f"{metric} 95 % CI"] = intervals
    methods = [_method(o, with_recipe="recipe" not in shown) for o in options]
    header = ["run", "method", *shown, *measured]
    cells = [run_names(folders), methods, *(values[name] for name in shown)]
    rows = [list(row) for row in zip(*cells, *measured.values())]
    if sort is not None:
        rows = _sorted(rows, header, sort)
    return header, rows


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with the folder above where several have one name."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else os.path.join(folder.resolve().parent.name, name)
        for name, folder in zip(names, folders)
    ]


def _read_run(folder: Path) -> tuple[Options, str]:
    """(options, digest of the evaluated images) of config.json.

    The digest is "" for a run of an earlier version; without config.json both are empty.
    """
    tree = read_json(RunFiles(folder).config)
    if not tree:
        return {}, ""
    images = tree.get("images")
    digest = str(images.get("evaluated") or "") if isinstance(images, dict) else ""
    try:
        return flatten(Config.from_dict(tree["config"]).to_dict()), digest
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{RunFiles(folder).config}: made by another version of fastirt ({error})") from error


def _distinct_names(names: list[str], digests: list[str]) -> list[str]:
    """Names of data sets, with the start of the digest if several data sets share a name."""
    known = {name: {d for n, d in zip(names, digests) if n == name and d} for name in names}
    return [f"{name} {digest[:6]}" if len(known[name]) > 1 else name for name, digest in zip(names, digests)]


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

    def key(row: list[str]) -> tuple[int, float, str]:
        try:
            return 0, -float(row[column]), ""
        except ValueError:
            return (1 if row[column] else 2), 0.0, row[column]

    return sorted(rows, key=key)
