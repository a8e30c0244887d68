"""What a run says while it trains: a progress bar, one JSON line per log step, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastirt.atomic import replacing
from fastirt.errors import UserError
from fastirt.training.tensorboard_log import TensorBoardLog

log = logging.getLogger("fastirt")
T = TypeVar("T")


class RunLog:
    """Writes `log.jsonl` in the run's folder and TensorBoard events; rows past `step` (of a run that was killed) are cut off."""

    def __init__(self, folder: Path, tensorboard: Path, step: int, total: int, redo: bool) -> None:
        """redo: the evaluation of `step` itself will be done again, so its row goes too. Raises UserError for a folder without room."""
        self.path = folder / "log.jsonl"
        try:
            cut_back(self.path, step, redo)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}): choose another --output-dir"
            ) from error
        self._board = TensorBoardLog(tensorboard, step)
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self.bar = tqdm(
            initial=step, total=total, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty(), desc="train"
        )

    def row(self, row: dict[str, Any]) -> None:
        """One log step or evaluation: `row` holds `step` and numbers."""
        row = {name: value for name, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._board.add("train" if "loss" in row else "eval", row)

    def losses(self, row: dict[str, Any], lambda_reg: float) -> None:
        """The row of a log step, and a line of it for people."""
        self.row(row)
        text = (
            f"loss {row['loss']:.4f} = batch {row['contrastive_batch']:.4f} + memory {row['contrastive_memory']:.4f} "
            f"+ {lambda_reg:g} x koleo {row['koleo']:.4f}"
        )
        speed = (
            f"{row['imgs_per_s']:.0f} imgs/s, MFU {100 * row['mfu']:.1f} %, input wait {100 * row['input_wait']:.1f} %"
        )
        self.bar.set_postfix_str(f"{text}, {speed}")
        left = f"{int(row['seconds_left']) // 60}:{int(row['seconds_left']) % 60:02d}"
        log.info("step %d/%d  %s  %s  %s left", row["step"], self.bar.total, text, speed, left)

    def close(self) -> None:
        self.bar.close()
        self._redirect.__exit__(None, None, None)
        self._board.close()
        self._file.close()


class NoLog:
    """What a rank writes that is not the first: nothing."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def row(self, row: dict[str, Any]) -> None: ...

    def losses(self, row: dict[str, Any], lambda_reg: float) -> None: ...

    def close(self) -> None: ...


class InputWait:
    """How long the device stood still for want of a batch.

    On a CPU that is the time until a batch is there. A GPU works behind the host, which may wait for a batch while the device is busy: there
    no more counts than the gap, on the device's own clock, between the end of a step and the moment at which the next batch was there.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._open: deque[tuple[float, Any, Any]] = (
            deque()
        )  # (host's wait, events before and after it) not yet reached by the device

    def follow(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the consumer does a step with each."""
        while True:
            ended, before = self.now(), time.perf_counter()
            batch = next(batches, None)
            waited = time.perf_counter() - before
            if batch is None:
                return
            if self.on_gpu:
                self._open.append((waited, ended, self.now()))
            else:
                self._seconds += waited
            yield batch

    def read(self) -> float:
        """Seconds since the last reading, as far as the device has come; waits for nothing."""
        while self._open and self._open[0][2].query():
            waited, ended, there = self._open.popleft()
            self._seconds += min(waited, ended.elapsed_time(there) / 1e3)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def now(self) -> Any:
        """An event that the device passes when it has done all that it was given; None on a CPU."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Throughput:
    """Images per second, utilisation, input wait and time left, each over the time since the last reading.

    flops: of one image in a step; peak: FLOP/s that the device could do. `waiting` wraps the batches.
    """

    def __init__(self, batch_size: int, flops: float, peak: float, device: torch.device) -> None:
        self.batch_size, self.flops, self.peak = batch_size, flops, peak
        self._wait = InputWait(device)
        self._start, self._steps = self._now(), 0
        self.waiting = self._wait.follow

    def tick(self) -> None:
        self._steps += 1

    def read(self, steps_left: int) -> Callable[[], dict[str, float]]:
        """Ends the window. The result gives imgs_per_s, mfu and input_wait (shares of 1) and seconds_left; on a GPU only once
        the device has come as far as the host was here: the host's clock alone would time how fast steps are launched.
        """
        before, steps, waited = self._start, self._steps, self._wait.read()
        self._start, self._steps = self._now(), 0
        after = self._start
        return lambda: self._numbers(max(_seconds(before, after), 1e-9), steps, waited, steps_left)

    def _numbers(self, elapsed: float, steps: int, waited: float, steps_left: int) -> dict[str, float]:
        rate = steps / elapsed
        images = rate * self.batch_size
        self.peak = max(self.peak, images * self.flops)  # a CPU's is an estimate, from one kind of product
        return {
            "imgs_per_s": round(images, 1),
            "mfu": round(images * self.flops / self.peak, 4),
            "input_wait": round(min(1.0, waited / elapsed), 4),
            "seconds_left": round(steps_left / rate, 1) if rate else math.inf,
        }

    def _now(self) -> Any:
        return self._wait.now() if self._wait.on_gpu else time.perf_counter()


def _seconds(before: Any, after: Any) -> float:
    """Between two times of the host, or two events that the device has passed."""
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3


def cut_back(path: Path, step: int, redo: bool = False) -> None:
    """Drop the rows of a JSON-lines log that lie past `step`, with `redo` the evaluation of `step` itself, and half-written rows."""
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
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
