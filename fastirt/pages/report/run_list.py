"""The runs of a report as the page lists them: cards, the table of metrics, curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

import markupsafe

from fastirt.config.options import Config
from fastirt.config.run_files import RunFiles
from fastirt.errors import UserError
from fastirt.pages.charts import Curve, Style, line_chart
from fastirt.retrieval.compare_runs import comparison, run_names
from fastirt.retrieval.published_results import DECIMALS, PUBLISHED, PUBLISHED_RANKS
from fastirt.retrieval.report import interval, read_json, read_metrics
from fastirt.training.run_log import read_log

FURTHER = {"map@r": "MAP@R", "map": "mAP", "mrr": "MRR"}


@dataclass(frozen=True)
class ListedRun:
    """A run by name, with its metrics (empty: unfinished), log rows and options (None: unknown)."""

    path: Path
    name: str
    style: Style
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    config: Optional[Config]

    @property
    def headline(self) -> str:
        """Name of the first metric, by which runs are ordered; empty without metrics."""
        return next((name for name in self.metrics if name.startswith("recall@")), "")

    @property
    def value(self) -> str:
        return f"{100 * self.metrics[self.headline]:.2f} %" if self.headline else ""

    @property
    def interval(self) -> str:
        return interval(self.metrics, self.headline).replace("-", " to ") if self.headline else ""

    @property
    def further(self) -> list[str]:
        """Other metrics as text."""
        shown = [f"{label} {100 * self.metrics[name]:.1f} %" for name, label in FURTHER.items() if name in self.metrics]
        if "median_rank" in self.metrics:
            shown.append(f"median rank {self.metrics['median_rank']:g}")
        return shown


def list_runs(folders: Sequence[Path]) -> list[ListedRun]:
    """Raises UserError if a folder holds no run."""
    runs = []
    for number, (folder, name) in enumerate(zip(folders, run_names(folders))):
        tree = read_json(RunFiles(folder).config)
        metrics = read_metrics(folder, missing_is_empty=bool(tree))
        try:
            config = Config.from_dict(tree["config"]) if tree else None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{RunFiles(folder).config}: made by another version of fastirt ({error})") from error
        runs.append(ListedRun(folder, name, Style(number), metrics, read_log(RunFiles(folder).log), config))
    return runs


def best_first(runs: Sequence[ListedRun]) -> list[ListedRun]:
    """By the first metric; of equal ones the first given, and runs without metrics last."""
    return sorted(runs, key=lambda run: -run.metrics.get(run.headline, -1.0))


def metrics_table(runs: Sequence[ListedRun], sort: Optional[str]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """(header, rows of the runs as `fastirt report` prints them, published rows).

    Published rows are those of the runs' data set, if they share one. Raises UserError.
    """
    header, rows = comparison([run.path for run in runs], sort)
    datasets = {run.config.data.dataset for run in runs if run.config is not None}
    dataset = datasets.pop() if len(datasets) == 1 else ""
    published = []
    for row in PUBLISHED.get(dataset, []):
        known = {
            f"recall@{k} %": f"{value:.{DECIMALS[row.source]}f}"
            for k, value in zip(PUBLISHED_RANKS[dataset], row.recalls)
        }
        known |= {"run": f"{row.source}: {row.model}", "method": row.method}
        published.append([known.get(name, "") for name in header])
    return header, rows, published


def training_charts(runs: Sequence[ListedRun]) -> list[tuple[str, str, markupsafe.Markup]]:
    """(title, caption, chart) of loss, learning rate and Recall, each if any run logged it."""
    first = next((run.headline for run in runs if run.headline), "recall@1")
    charts = []
    for key, title, caption in (
        ("loss", "Loss", "It rises where the cross-batch memory comes in."),
        ("lr", "Learning rate", ""),
        (first, _title(first), "On the test split, at each evaluation; one point where only the end was evaluated."),
    ):
        curves, said = [], []
        for run in runs:
            points = [(row["step"], row[key]) for row in run.log if key in row]
            if points:
                curves.append(Curve(run.style, *zip(*points)))
                said.append(f"{run.name} from {points[0][1]:.3g} to {points[-1][1]:.3g}")
        if curves:
            label = f"{title} by step: {'; '.join(said)}"
            is_recall = key == first
            chart = line_chart(curves, label, x_label="step", markers=is_recall, percent=is_recall)
            charts.append((title, caption, chart))
    return charts


def recall_chart(runs: Sequence[ListedRun]) -> Optional[markupsafe.Markup]:
    """Recall@K by K, for the runs that have more than one K."""
    curves, said = [], []
    for run in runs:
        points = sorted(
            (int(name.split("@")[1]), value) for name, value in run.metrics.items() if name.startswith("recall@")
        )
        if len(points) > 1:
            curves.append(Curve(run.style, *zip(*points)))
            said.append(f"{run.name} " + ", ".join(f"{100 * value:.1f} % at {k}" for k, value in points))
    if not curves:
        return None
    return line_chart(curves, f"Recall@K by K: {'; '.join(said)}", x_label="K", markers=True, percent=True, log_x=True)


def _title(metric: str) -> str:
    return metric.replace("recall", "Recall")
