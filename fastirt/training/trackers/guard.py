"""A tracker in a thread of its own: what it raises, or how long it blocks, never ends a run."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Callable, Optional

from fastirt.errors import UserError, first_line
from fastirt.training.trackers.interface import Row, Tracker

log = logging.getLogger("fastirt")

# The longest that a run waits, in seconds, at its start and at its end.
START_TIMEOUT = 20.0
FINISH_TIMEOUT = 30.0


class GuardedTracker:
    """Hands calls to a tracker in order, without waiting for it; warns once where it fails."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """make: called in the thread, so that the import of a library cannot end the run either."""
        self.name, self._make = name, make
        self._calls: queue.SimpleQueue[Optional[Callable[[Tracker], None]]] = queue.SimpleQueue()
        self._started = threading.Event()
        self._refused: Optional[UserError] = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)

    def start(self) -> None:
        """Raises the tracker's UserError; other errors are a warning."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT):
            self._warn(f"has not started after {START_TIMEOUT:g} seconds: training does not wait for it")
        if self._refused is not None:
            raise self._refused

    def log(self, group: str, row: Row) -> None:
        if self._thread.is_alive():
            self._calls.put(lambda tracker: tracker.log(group, row))

    def finish(self, metrics: Row, finished: bool) -> None:
        """Ask for the end; `join` waits for it."""
        self._calls.put(lambda tracker: tracker.finish(metrics, finished))
        self._calls.put(None)

    def join(self, deadline: float) -> None:
        """deadline: of `time.monotonic`. A tracker that has not even started is not waited for."""
        if self._started.is_set():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"has not finished after {FINISH_TIMEOUT:g} seconds: left behind; log.jsonl is complete")

    def _work(self) -> None:
        try:
            tracker = self._make()
            tracker.start()
            self._started.set()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except UserError as error:
            if self._started.is_set():
                self._warn(f"failed ({error}): it stops here, log.jsonl goes on")
            else:
                self._refused = error
        except BaseException as error:  # SystemExit too: these libraries raise all kinds
            self._warn(f"failed ({type(error).__name__}: {first_line(error)}): it stops here, log.jsonl goes on")
        finally:
            self._started.set()

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("--tracker %s: %s", self.name, message)
