"""`fastirt report`: runs side by side, with a column for whatever tells them apart."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

from fastirt.config.options import TRAINING_OPTIONS, Config, RunConfig, flatten
from fastirt.errors import UserError
from fastirt.retrieval.report import markdown, read_json, read_metrics

Options = dict[str, Any]  # of a run, by bare name; empty for what has no config.json


def _dataset(options: Options) -> str:
    path = options["data_path"].rstrip("/")
    where = os.path.basename(path)
    if path.endswith(".csv"):
        where = f"{os.path.basename(os.path.dirname(path))}/{where}"
    split = " (val)" if options["eval_split"] == "val" else ""
    return (f"{options['dataset']} {where}" if options["dataset"] in ("folder", "csv") else options["dataset"]) + split


def _weights(options: Options) -> str:
    weights = options["weights"]
    return "/".join(Path(weights).parts[-2:]) if weights else "timm"


def _column(name: str) -> Callable[[Options], str]:
    """The cell of an option; empty where it says nothing of a run without training."""
    if name == "weights":
        return _weights
    if name in TRAINING_OPTIONS and name != "max_iter":
        return lambda options: _text(options[name]) if options["max_iter"] else ""
    return lambda options: _text(options[name])


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Options whose column comes first, and its name; every other option that changes figures follows, under its own name.
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
# Options that are no columns: they are shown elsewhere, or change nothing that is measured but rounding.
SHOWN_ELSEWHERE = {"method", "dataset", "data_path", "eval_split", "rank"}
UNMEASURED = {"packed", "loader", "num_workers", "pin_mem", "cache", "max_bad", "loss_impl", "loss_precision", "engine"}
UNMEASURED |= {"memory_sharded", "eval_freq", "eval_batch_size", "search", *(f.name for f in fields(RunConfig))}


def _columns() -> dict[str, Callable[[Options], str]]:
    """Columns by name, shown where runs differ in them."""
    rest = [name for name in flatten(Config().to_dict()) if name not in {*LABELS, *SHOWN_ELSEWHERE, *UNMEASURED}]
    labels = LABELS | {name: name.replace("_", " ") for name in rest}
    return {"data set": _dataset} | {label: _column(name) for name, label in labels.items()}


def compare_runs(folders: Sequence[Path], sort: Optional[str] = None) -> str:
    """A Markdown table with one row a run folder: method, whatever tells the runs apart, and metrics in per cent.

    Runs without metrics have empty cells. sort: the name of a column; numbers fall, then text rises, and what has no value
    comes last. Raises UserError for a folder that is no run's and for a column that is not there.
    """
    options = [_options(folder) for folder in folders]
    # A run without a test split has none, and one that is not finished has none yet.
    metrics = [read_metrics(folder, missing_is_empty=bool(own)) for folder, own in zip(folders, options)]
    columns = _columns()
    values = {name: [value(o) if o else "" for o in options] for name, value in columns.items()}
    values["data set"] = _told_apart(values["data set"], [_digest(folder) for folder in folders])
    shown = [name for name in columns if len(set(values[name]) - {""}) > 1]
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


def _digest(folder: Path) -> str:
    """Of the names and classes of the images that the run was evaluated on; "" for a run of an earlier version."""
    digests = (read_json(folder / "config.json") or {}).get("images")
    return str(digests.get("evaluated") or "") if isinstance(digests, dict) else ""


def _told_apart(names: list[str], digests: list[str]) -> list[str]:
    """Names of data sets, with the start of the digest where one name stands for several."""
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
