"""The thread that writes checkpoints, and the steps at which all ranks save and notice its end."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Callable, Iterator, Optional

from fastirt.distributed.failures import ReportedByMainRank
from fastirt.distributed.ranks import Ranks
from fastirt.errors import first_line, user_message

log = logging.getLogger("fastirt")

Part = Callable[[], Any]


class CheckpointWriter:
    """Runs the parts of one save after each other in a thread, while the loop goes on.

    A save is an iterator of parts. What it does between two parts runs in the loop's thread, at a
    step boundary. All ranks begin the same saves at the same steps and run the same number of
    parts; a part ends for all of them at the same step, which they find in the exchange of stop
    signals: each sends its `status` there and hands the largest of all ranks to `heed`.

    `due`: whether all ranks save now, because rank 0 began its last save `seconds` ago.

    Used as a context, it waits at the end. After an error of the loop it lets the running part end
    and begins no other: the other ranks may be gone.
    """

    def __init__(self, ranks: Ranks, seconds: int = 0) -> None:
        """seconds: between two saves by time; 0: none."""
        self.ranks, self.seconds, self.due = ranks, seconds, False
        self._parts: Iterator[Part] = iter(())
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None
        self._begun = 0  # parts in all; a number that arrives late belongs to an earlier part
        self._last = time.monotonic()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        if error is None:
            self.join()
        elif self._thread is not None:
            self._thread.join()
            if self._error is not None:  # the loop's own error is the one that is raised
                log.error("%s", user_message(self._error) or first_line(self._error))

    def begin(self, parts: Iterator[Part]) -> None:
        """Begin a save; one that is in progress ends first.

        Called by all ranks. Raises the exception of a part on the rank where it failed, and
        ReportedByMainRank on the others.
        """
        self.join()
        self.due, self._last, self._parts = False, time.monotonic(), parts
        self._begin_next()

    def status(self) -> tuple[int, int]:
        """Two numbers for the exchange of this step: which part a save by time would begin with,
        and the last part that has ended here, negative.
        """
        late = self.ranks.is_main and 0 < self.seconds <= time.monotonic() - self._last
        runs = self._thread is not None and self._thread.is_alive()
        return self._begun + 1 if late else 0, runs - self._begun

    def heed(self, wanted: int, ended: int) -> None:
        """Act on the largest `status` of all ranks. Raises as `begin` does."""
        self.due = wanted == self._begun + 1
        if self._thread is not None and ended == -self._begun:
            self._end_part()

    def restart_clock(self) -> None:
        """The time until the next save by time begins now: after an evaluation, which saves too."""
        self._last = time.monotonic()

    def join(self) -> None:
        """Wait for the end of the save. Called by all ranks; raises as `begin` does."""
        while self._thread is not None:
            self._end_part()

    def _begin_next(self) -> None:
        part = next(self._parts, None)
        if part is None:
            self._parts = iter(())  # frees the copies
            return
        self._begun += 1
        self._thread = threading.Thread(target=self._run, args=(part,), name="fastirt-checkpoint", daemon=True)
        self._thread.start()

    def _run(self, part: Part) -> None:
        try:
            part()
        except BaseException as error:  # raised again in the loop
            self._error = error

    def _end_part(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        failed = self.ranks.host.gather_json(error is not None)
        if error is not None:
            raise error
        if any(failed):
            raise ReportedByMainRank
        self._begin_next()
