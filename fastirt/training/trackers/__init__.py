"""Trackers of a run, `--tracker tensorboard wandb mlflow`: each a module here, behind a guard."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Iterable, NamedTuple

from fastirt.errors import UserError
from fastirt.training.trackers import guard
from fastirt.training.trackers.guard import GuardedTracker
from fastirt.training.trackers.interface import Row, TrackedRun, Tracker

__all__ = ["KINDS", "TrackedRun", "Tracker", "Trackers", "check_trackers"]


class Kind(NamedTuple):
    """Where a tracker's class is, and what it needs."""

    module: str
    name: str
    package: str
    install: str


# By the value of --tracker; imported when used.
KINDS = {
    "tensorboard": Kind("fastirt.training.trackers.tensorboard", "TensorBoard", "tensorboard", "tensorboard"),
    "wandb": Kind("fastirt.training.trackers.wandb", "WeightsAndBiases", "wandb", "'fastirt[wandb]'"),
    "mlflow": Kind("fastirt.training.trackers.mlflow", "MLflow", "mlflow", "'fastirt[mlflow]'"),
}


def check_trackers(names: Iterable[str]) -> None:
    """Raises UserError where a tracker's package is missing, or `none` stands beside another."""
    names = list(names)
    if "none" in names and len(set(names)) > 1:
        raise UserError(f"--tracker {' '.join(names)}: none stands alone: leave it out")
    for name in names:
        if name != "none" and _is_missing(KINDS[name].package):
            kind = KINDS[name]
            raise UserError(f"--tracker {name}: needs {kind.package}: pip install {kind.install}, or leave {name} out")


def _is_missing(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is None
    try:
        return find_spec(package) is None
    except (ImportError, ValueError):  # half removed
        return True


def _make(kind: Kind, run: TrackedRun) -> Tracker:
    return getattr(import_module(kind.module), kind.name)(run)


class Trackers:
    """The trackers of one run; none of them can end it."""

    def __init__(self, names: Iterable[str], run: TrackedRun) -> None:
        """Raises UserError where a tracker cannot start for a reason that the user can mend."""
        self._trackers: list[GuardedTracker] = []
        try:
            for name in dict.fromkeys(names):
                if name != "none":
                    self._trackers.append(GuardedTracker(name, partial(_make, KINDS[name], run)))
                    self._trackers[-1].start()
        except BaseException:
            self.close()
            raise

    def log(self, group: str, row: Row) -> None:
        """The finite numbers of a row of log.jsonl; group: "train" or "eval"."""
        for tracker in self._trackers:
            tracker.log(group, row)

    def close(self, metrics: Row | None = None) -> None:
        """metrics: of the final model, where the run finished. A second call does nothing."""
        trackers, self._trackers = self._trackers, []
        final = {k: v for k, v in (metrics or {}).items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for tracker in trackers:
            tracker.finish(final, metrics is not None)
        deadline = time.monotonic() + guard.FINISH_TIMEOUT
        for tracker in trackers:
            tracker.join(deadline)
