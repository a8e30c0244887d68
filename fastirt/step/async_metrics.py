"""Asynchronous device-to-host copies of step metrics."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch

from fastirt.step.step_counters import LOSS_NAMES, StepCounters

Timing = Callable[[], dict[str, Any]]


class AsyncMetrics:
    """Copies a step's flag and sums into page-locked memory; reads them once they have arrived."""

    def __init__(self, counters: StepCounters) -> None:
        self.counters, self.on_gpu = counters, counters.sums.is_cuda
        self._flag = torch.full((), -1, dtype=torch.int64, pin_memory=self.on_gpu)
        self._sums = torch.zeros(len(LOSS_NAMES), dtype=torch.float64, pin_memory=self.on_gpu)
        self._pending: Optional[tuple[dict[str, Any], Timing, int, Any]] = None

    def first_bad_step(self, wait: bool = False) -> int:
        """The first non-finite step, or -1.

        Without `wait`: as of the previous call of this method.
        """
        if wait:
            return int(self.counters.first_bad_step)
        earlier = int(self._flag)
        self._flag.copy_(self.counters.first_bad_step, non_blocking=True)
        return earlier if self.on_gpu else int(self._flag)

    def request(self, row: dict[str, Any], timing: Timing = dict) -> None:
        """Start to copy the mean of each loss since the last call; at most one copy is pending.

        `poll` returns `row` with the means, and with what `timing()` gives once the device got
        here.
        """
        self._sums.copy_(self.counters.sums, non_blocking=True)
        arrived = None
        if self.on_gpu:
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = (row, timing, self.counters.steps_summed, arrived)
        self.counters.start_sums()

    def poll(self, wait: bool = False) -> Optional[dict[str, Any]]:
        """The requested row with its means, once; None if none is pending or none has arrived."""
        if self._pending is None:
            return None
        row, timing, count, arrived = self._pending
        if arrived is not None and not arrived.query():
            if not wait:
                return None
            arrived.synchronize()
        self._pending = None
        return {**row, **dict(zip(LOSS_NAMES, (self._sums / max(1, count)).tolist())), **timing()}
