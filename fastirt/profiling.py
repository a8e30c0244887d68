"""`--profile N`: where the time of N steps goes, and a trace of them."""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Iterable, Iterator, Optional

import torch

from fastirt.engine import WARM_UP
from fastirt.input.loader import Batch
from fastirt.step import PHASES, TrainStep

log = logging.getLogger("fastirt")

SKIPPED = WARM_UP + 2  # steps before the first that is traced: compilation and capture are over
TRACE = "trace.json"


class Marks:
    """Times at which the phases of steps end: on the device's clock where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps: list[list[tuple[str, object]]] = []

    def __call__(self, phase: str) -> None:
        if phase == "start":
            self.steps.append([])
        if self.on_gpu:
            now: object = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.steps[-1].append((phase, now))

    def milliseconds(self) -> dict[str, float]:
        """Median over the steps by phase; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, list[float]] = {phase: [] for phase in PHASES}
        for marks in self.steps:
            for (_, before), (phase, now) in zip(marks, marks[1:]):
                spent[phase].append(before.elapsed_time(now) if self.on_gpu else (now - before) * 1e3)
        return {phase: statistics.median(values) for phase, values in spent.items() if values}


class Profile:
    """Follows a run's batches, traces `steps` of them and then says where their time went.

    A captured step is one launch and cannot be split, so with the graph engine as many further steps run uncaptured for that.
    """

    def __init__(self, steps: int, module: TrainStep, folder: Path) -> None:
        self.steps, self.module, self.path = steps, module, folder / TRACE

    def follow(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the consumer does a step with each. Fewer than SKIPPED + steps: nothing is said but that."""
        batches, module = iter(batches), self.module
        for _ in range(SKIPPED):
            if (batch := next(batches, None)) is None:
                break
            yield batch
        traced = torch.profiler.profile(acc_events=True)
        plain = module.mark
        marks = None if module.capture is not None else Marks(module.device)
        traced.start()
        try:
            wall, waited = yield from self._measure(batches, marks)
        finally:
            traced.stop()
        uncaptured: Optional[float] = None
        if marks is None and wall:
            module.capture.enabled, marks = False, Marks(module.device)
            try:
                uncaptured, _ = yield from self._measure(batches, marks)
            finally:
                module.capture.enabled = True
        module.mark = plain
        if not wall or not marks.steps:
            log.warning(
                "--profile %d: the run ended before that many steps after the first %d: no trace", self.steps, SKIPPED
            )
        else:
            traced.export_chrome_trace(str(self.path))
            self._say(wall, waited, marks.milliseconds(), uncaptured)
        yield from batches

    def _measure(self, batches: Iterator[Batch], marks: Optional[Marks]) -> Iterator[Batch]:
        """Yields `steps` batches; returns (milliseconds a step, of these waited for input), (0, 0) where they ran out."""
        self.module.mark = marks or (lambda phase: None)
        self._wait()
        start, waited = time.perf_counter(), 0.0
        for _ in range(self.steps):
            before = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - before
            if batch is None:
                return 0.0, 0.0
            yield batch
        self._wait()
        return (time.perf_counter() - start) / self.steps * 1e3, waited / self.steps * 1e3

    def _wait(self) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)

    def _say(self, wall: float, waited: float, phases: dict[str, float], uncaptured: Optional[float]) -> None:
        of = wall if uncaptured is None else uncaptured
        rows = {"input wait": waited, **phases}
        rows["other"] = max(0.0, of - sum(rows.values()))
        most = max(rows, key=rows.get)
        log.info(
            "profile: %.2f ms a step (%s engine, %d steps), input wait %.2f ms",
            wall,
            self.module.engine,
            self.steps,
            waited,
        )
        if uncaptured is not None:
            log.info("profile: split over %d uncaptured steps of %.2f ms", self.steps, uncaptured)
        for name, spent in rows.items():
            log.info("profile: %-10s %9.2f ms  %5.1f %%", name, spent, 100 * spent / of)
        log.info("profile: most of it is %s; trace: %s (chrome://tracing or ui.perfetto.dev)", most, self.path)
