"""`--profile N`: where the time of N steps goes, and a trace of them."""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any, Generator, Iterable, Iterator, Optional

import torch

from fastirt.loading.batch import Batch
from fastirt.step.cuda_graph import WARM_UP
from fastirt.step.train_step import PHASES, TrainStep
from fastirt.training.throughput import InputWait

log = logging.getLogger("fastirt")

TRACE = "trace.json"


class Marks:
    """Times at which the phases of steps end: on the device's clock where it is a GPU.

    captured: the events become part of the next CUDA graph, and each replay gives them new times.
    """

    def __init__(self, device: torch.device, captured: bool = False) -> None:
        self.device, self.on_gpu, self.captured = device, device.type == "cuda", captured
        self.spent: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._step: dict[str, Any] = {}
        self._steps: list[dict[str, Any]] = []

    def __call__(self, phase: str) -> None:
        if phase == "start" and not self.captured:
            self._step = {}
            self._steps.append(self._step)
        if not self.on_gpu:
            self._step[phase] = time.perf_counter()
            return
        if phase not in self._step:
            self._step[phase] = torch.cuda.Event(enable_timing=True, external=self.captured and phase != "start")
        self._step[phase].record()

    def read(self) -> None:
        """Add the times of the steps since the last reading (`captured`: of the last step alone).

        Waits for the device.
        """
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        for step in [self._step] if self.captured else self._steps:
            for (_, before), (phase, now) in zip(step.items(), list(step.items())[1:]):
                self.spent[phase].append(before.elapsed_time(now) if self.on_gpu else (now - before) * 1e3)
        self._steps.clear()

    def milliseconds(self) -> dict[str, float]:
        """Median over the steps by phase."""
        return {phase: statistics.median(values) for phase, values in self.spent.items() if values}


class Profile:
    """Follows a run's batches, traces `steps` of them and logs where their time went.

    With the graph engine the step is captured again with timing events between its phases and
    measured for another `steps` steps, because a captured step is one launch. All ranks run this;
    only rank 0 logs.
    """

    def __init__(self, steps: int, module: TrainStep, folder: Path, logs: bool = True) -> None:
        self.steps, self.module, self.path, self.logs = steps, module, folder / TRACE, logs
        # Steps before the trace, in which compilation and capture happen.
        self.skipped = 2 + (module.engine.capture.warm_up if module.engine.capture is not None else WARM_UP)

    def follow(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the consumer does a step with each.

        If they end too soon, only a warning is logged.
        """
        batches, module = iter(batches), self.module
        yield from itertools.islice(batches, self.skipped)
        # Kineto reads it at its first use; without it, it prints its own events, and an error
        # without a GPU.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        traced = torch.profiler.profile(acc_events=True)
        plain, captured = module.on_phase_end, module.engine.is_captured
        marks = Marks(module.device, captured)
        traced.start()
        try:
            wall, waited = yield from self._measure(batches, None if captured else marks)
        finally:
            traced.stop()
        if captured and wall:
            module.on_phase_end = marks
            module.engine.forget()
            # the last of them is captured
            yield from itertools.islice(batches, module.engine.capture.warm_up + 1)
            yield from self._measure(batches, marks)
            module.engine.forget()
        module.on_phase_end = plain
        if self.logs and not marks.milliseconds():
            log.warning(
                "--profile %d: the run ended before that many steps after the first %d: no trace",
                self.steps,
                self.skipped,
            )
        elif self.logs:
            traced.export_chrome_trace(str(self.path))
            self._log(wall, waited, marks.milliseconds())
        yield from batches

    def _measure(self, batches: Iterator[Batch], marks: Optional[Marks]) -> Generator[Batch, None, tuple[float, float]]:
        """Yields `steps` batches; returns (milliseconds a step, of which waiting for input), or (0,
        0) if they ran out.
        """
        self.module.on_phase_end = marks or (lambda phase: None)
        self._wait()
        start, waiting, count = time.perf_counter(), InputWait(self.module.device), 0
        for batch in waiting.follow(itertools.islice(batches, self.steps)):
            yield batch
            count += 1
            if marks is not None and marks.captured:
                marks.read()
        self._wait()
        if count < self.steps:
            return 0.0, 0.0
        if marks is not None and not marks.captured:
            marks.read()
        return (time.perf_counter() - start) / self.steps * 1e3, waiting.read() / self.steps * 1e3

    def _wait(self) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)

    def _log(self, wall: float, waited: float, phases: dict[str, float]) -> None:
        rows = {"input wait": waited, **phases}
        rows["other"] = max(0.0, wall - sum(rows.values()))
        log.info("profile: %.2f ms a step (%s engine, %d steps)", wall, self.module.engine.name, self.steps)
        for name, spent in rows.items():
            log.info("profile: %-10s %9.2f ms  %5.1f %%", name, spent, 100 * spent / wall)
        log.info(
            "profile: most of it is %s; trace: %s (chrome://tracing or ui.perfetto.dev)",
            max(rows, key=rows.get),
            self.path,
        )
