"""Logs of a run: a progress bar, one JSON line per log step, and trackers such as TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastirt.atomic import atomic_write
from fastirt.errors import UserError
from fastirt.training.trackers import TrackedRun, Trackers

log = logging.getLogger("fastirt")
T = TypeVar("T")


class RunLog:
    """Writes JSON lines to log.jsonl and hands them to the trackers; rows past the run's step (of a
    run that was killed) are cut off.
    """

    def __init__(self, run: TrackedRun, redo: bool) -> None:
        """redo: the evaluation of the run's step will be done again, so its row goes too.

        Raises UserError for a log that cannot be written.
        """
        self.path, step, total = run.files.log, run.step, run.config.optim.max_iter
        try:
            truncate_log(self.path, step, redo)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}): choose another --output-dir"
            ) from error
        self._trackers = Trackers(run.config.run.tracker, run)
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self.bar = tqdm(
            initial=run.step,
            total=total,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            desc="train",
        )

    def row(self, row: dict[str, Any]) -> None:
        """One log step or evaluation: `row` holds `step` and numbers."""
        row = {name: value for name, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._trackers.log("train" if "loss" in row else "eval", row)

    def losses(self, row: dict[str, Any], lambda_reg: float) -> None:
        """The row of a log step, and a line of it for the console."""
        self.row(row)
        text = (
            f"loss {row['loss']:.4f} = batch {row['contrastive_batch']:.4f} + memory {row['contrastive_memory']:.4f} "
            f"+ {lambda_reg:g} x koleo {row['koleo']:.4f}"
        )
        mfu = f"MFU {100 * row['mfu']:.1f} %, " if "mfu" in row else ""
        speed = f"{row['imgs_per_s']:.0f} imgs/s, {mfu}input wait {100 * row['input_wait']:.1f} %"
        self.bar.set_postfix_str(f"{text}, {speed}")
        log.info("step %d/%d  %s  %s  %s left", row["step"], self.bar.total, text, speed, duration(row["seconds_left"]))

    def finish(self, metrics: dict[str, Any]) -> None:
        """The run is complete. metrics: of the final model; empty without an evaluation."""
        self._trackers.close(metrics)

    def close(self) -> None:
        self.bar.close()
        self._redirect.__exit__(None, None, None)
        self._file.close()
        self._trackers.close()


class NoLog:
    """The log of ranks other than rank 0: nothing is written."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def row(self, row: dict[str, Any]) -> None: ...

    def losses(self, row: dict[str, Any], lambda_reg: float) -> None: ...

    def finish(self, metrics: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def truncate_log(path: Path, step: int, redo: bool = False) -> None:
    """Drop half-written rows and rows past `step`; with `redo` also the evaluation of `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if (
            isinstance(row, dict)
            and "step" in row
            and (row["step"] < step or (row["step"] == step and ("loss" in row or not redo)))
        ):
            kept.append(line + "\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl whose step and values are numbers; a half-written line is left out."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), (int, float)):
            rows.append({name: value for name, value in row.items() if isinstance(value, (int, float))})
    return rows


def duration(seconds: float) -> str:
    """In the two largest units: `3 h 20 min`, `5 min 0 s`, `12 s`."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
