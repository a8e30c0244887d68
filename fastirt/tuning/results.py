"""What the runs of a sweep measured, by setting: mean, spread, best; as JSON, CSV and a table."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence

from fastirt import __version__
from fastirt.atomic import atomic_write
from fastirt.config.run_file import below
from fastirt.errors import UserError
from fastirt.pages.sweep_page import PageRow, SweepPage
from fastirt.retrieval.report import markdown
from fastirt.tuning.settings import Setting
from fastirt.tuning.sweep_file import Sweep

NO_PERCENTAGE = {"median_rank"}


@dataclass
class RunResult:
    """One run: a setting with a seed.

    status: "waiting", "finished" or "failed", then `error` says why.
    """

    seed: int
    folder: str
    status: str = "waiting"
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


@dataclass
class SettingResult:
    """The runs of a setting, one for each seed."""

    setting: Setting
    runs: list[RunResult]

    @property
    def status(self) -> str:
        """ "failed" with a failed run, "finished" with all, else "waiting"."""
        states = {run.status for run in self.runs}
        return "failed" if "failed" in states else "waiting" if "waiting" in states else "finished"

    @property
    def error(self) -> str:
        return next((run.error for run in self.runs if run.error), "")

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    def values(self, metric: str) -> list[float]:
        """Of the finished runs."""
        return [run.metrics[metric] for run in self.runs if run.status == "finished" and metric in run.metrics]

    def mean(self, metric: str) -> Optional[float]:
        """None where no run measured it."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> Optional[float]:
        """The sample standard deviation over seeds; None of fewer than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def shown(self, metric: str) -> str:
        """`46.32 ± 0.85` in percent; empty where no run measured it."""
        mean, spread = self.mean(metric), self.spread(metric)
        if mean is None:
            return ""
        scale, digits = (1, 1) if metric in NO_PERCENTAGE else (100, 2)
        return f"{scale * mean:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if spread is not None else "")


def ranked(sweep: Sweep, results: Sequence[SettingResult]) -> list[SettingResult]:
    """Finished settings, the best first; then those that are not, then the failed ones."""

    def key(result: SettingResult) -> tuple[int, float]:
        mean = result.mean(sweep.metric)
        order = {"finished": 0, "waiting": 1, "failed": 2}[result.status]
        value = math.inf if mean is None else mean if sweep.lower_is_better else -mean
        return order, value

    return sorted(results, key=key)


def best_of(sweep: Sweep, results: Sequence[SettingResult]) -> Optional[SettingResult]:
    """None where no setting has finished."""
    first = next(iter(ranked(sweep, results)), None)
    return first if first is not None and first.status == "finished" and first.values(sweep.metric) else None


def command_line(sweep: Sweep, setting: Setting) -> str:
    """`fastirt train …` that trains a setting on the whole training set."""
    words = ["fastirt", "train"]
    for name, value in below(sweep.base, setting).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)] if value else []
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    return shlex.join(words)


def label(name: str, value: Any) -> str:
    """`--lr 0.0001`, for logs."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--{name.replace('_', '-')} {shown}"


def shown_metrics(sweep: Sweep, results: Sequence[SettingResult]) -> list[str]:
    """The metrics of tables: the chosen one, Recall@1 and MAP@R, as far as they are measured."""
    names = dict.fromkeys((sweep.metric, "recall@1", "map@r"))
    return [name for name in names if name == sweep.metric or any(result.values(name) for result in results)]


def table(sweep: Sweep, results: Sequence[SettingResult]) -> str:
    """A Markdown table, the best setting first, and the reasons of failed ones."""
    metrics = shown_metrics(sweep, results)
    header = ["", *(name.replace("_", " ") for name in sweep.space)]
    header += [name if name in NO_PERCENTAGE else f"{name} %" for name in metrics]
    header += ["runs", "seconds"]
    rows, notes = [], []
    for place, result in enumerate(ranked(sweep, results), 1):
        finished = sum(run.status == "finished" for run in result.runs)
        if result.status == "failed":
            notes.append(f"setting {place} failed: {shortened(result.error)}")
        rows.append(
            [
                str(place) if result.status != "failed" else f"{place} (failed)",
                *(_cell(result.setting[name]) for name in sweep.space),
                *(result.shown(metric) for metric in metrics),
                f"{finished}/{len(result.runs)}",
                f"{result.seconds:.0f}",
            ]
        )
    return "\n".join([markdown(header, rows), *notes])


def shortened(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _cell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def sweep_page(sweep: Sweep, results: Sequence[SettingResult], facts: dict[str, Any]) -> SweepPage:
    """What sweep.html shows."""
    best, metrics = best_of(sweep, results), shown_metrics(sweep, results)
    rows = [
        PageRow(
            place,
            [_cell(result.setting[name]) for name in sweep.space],
            [result.shown(metric) for metric in metrics],
            result.values(sweep.metric),
            [(run.seed, run.status, run.folder) for run in result.runs],
            result.status,
            result.error,
            result.seconds,
        )
        for place, result in enumerate(ranked(sweep, results), 1)
    ]
    return SweepPage(
        title=f"Sweep {sweep.path.stem}",
        metric=sweep.metric,
        in_percent=sweep.metric not in NO_PERCENTAGE,
        options=[name.replace("_", " ") for name in sweep.space],
        metrics=[name if name in NO_PERCENTAGE else f"{name} %" for name in metrics],
        rows=rows,
        seeds=sweep.seeds,
        facts=facts,
        command=command_line(sweep, best.setting) if best else None,
    )


def write_results(sweep: Sweep, results: Sequence[SettingResult], facts: dict[str, Any], out: Path) -> None:
    """sweep.json and sweep.csv, atomically. Raises UserError.

    facts: numbers of classes and images, for the JSON file.
    """
    best = best_of(sweep, results)
    metrics = shown_metrics(sweep, results)
    tree = {
        "fastirt": __version__,
        "file": str(sweep.path),
        "metric": sweep.metric,
        "validation": {"share": sweep.validation, "seed": sweep.seed, **facts},
        "settings": [
            {
                "flags": result.setting,
                "status": result.status,
                "mean": {name: result.mean(name) for name in metrics},
                "spread": {name: result.spread(name) for name in metrics},
                "runs": [vars(run) for run in result.runs],
            }
            for result in ranked(sweep, results)
        ],
        "best": best and best.setting,
        "command": best and command_line(sweep, best.setting),
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = list(dict.fromkeys(name for result in results for run in result.runs for name in run.metrics))
    writer.writerow([*sweep.space, "seed", "status", *measured, "seconds", "folder", "error"])
    for result in ranked(sweep, results):
        flags = [_cell(result.setting[name]) for name in sweep.space]
        for run in result.runs:
            numbers = [run.metrics.get(name, "") for name in measured]
            writer.writerow([*flags, run.seed, run.status, *numbers, round(run.seconds, 2), run.folder, run.error])
    for name, content in (("sweep.json", json.dumps(tree, indent=1) + "\n"), ("sweep.csv", text.getvalue())):
        write_text(out / name, content)


def write_text(path: Path, text: str) -> None:
    """Atomically. Raises UserError."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
