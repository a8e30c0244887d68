"""Images a second, model FLOP utilization (MFU), and the time that the device waits for input."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any, Callable, Iterator, Optional

import torch

from fastirt.training.run_log import T


class InputWait:
    """Time the device idled waiting for input, in seconds.

    CPU: time blocked in `next`. GPU: the smaller of the host's wait and the gap on the device's own
    clock between the end of a step and the arrival of the next batch, because the host runs ahead
    of the device.
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
        """Seconds since the last reading, of the steps that are done; does not wait."""
        while self._open and self._open[0][2].query():
            waited, ended, arrived = self._open.popleft()
            self._seconds += min(waited, ended.elapsed_time(arrived) / 1e3)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def now(self) -> Any:
        """An event after all work queued so far; None on a CPU."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Throughput:
    """Images per second, MFU, input wait and time left, each over the time since the last reading.

    flops: of one image in a step, 0 if unknown. peak: FLOP/s of all devices by their data sheet,
    None if unknown. `waiting` wraps the batches.
    """

    def __init__(self, batch_size: int, flops: float, peak: Optional[float], device: torch.device) -> None:
        self.batch_size, self.flops, self.peak = batch_size, flops, peak
        self._wait = InputWait(device)
        self._start, self._steps = self._now(), 0
        self.waiting = self._wait.follow

    def tick(self) -> None:
        self._steps += 1

    def read(self, steps_left: int) -> Callable[[], dict[str, float]]:
        """End the window.

        The returned function gives imgs_per_s, mfu and input_wait (shares of 1), and seconds_left;
        no mfu where flops or peak are unknown.

        On a GPU call it once the device has done the steps of the window: the times are the
        device's, because the host's clock would time how fast steps are launched.
        """
        before, steps, waited = self._start, self._steps, self._wait.read()
        self._start, self._steps = self._now(), 0
        after = self._start
        return lambda: self._numbers(max(_seconds(before, after), 1e-9), steps, waited, steps_left)

    def _numbers(self, elapsed: float, steps: int, waited: float, steps_left: int) -> dict[str, float]:
        rate = steps / elapsed
        images = rate * self.batch_size
        mfu = {"mfu": round(images * self.flops / self.peak, 4)} if self.flops and self.peak else {}
        return {
            "imgs_per_s": round(images, 1),
            **mfu,
            "input_wait": round(min(1.0, waited / elapsed), 4),
            "seconds_left": round(steps_left / rate, 1) if rate else math.inf,
        }

    def _now(self) -> Any:
        return self._wait.now() if self._wait.on_gpu else time.perf_counter()


def _seconds(before: Any, after: Any) -> float:
    """Between two times of the host, or two events that the device has passed."""
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3
