"""SIGTERM and SIGINT: the handler only sets a flag, and the loop acts on it at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Optional


class Interrupted(Exception):
    """Raised inside work that may be dropped at any point, such as an evaluation."""


class StopSignal:
    """While active, remembers the first SIGTERM or SIGINT in `signal`.

    A second signal terminates the process, unless `ignore_repeats`: launchers send several and
    escalate to SIGKILL themselves.

    Inside `with stopper.interruptible():` the signal raises Interrupted at once.
    """

    def __init__(self, ignore_repeats: bool = False) -> None:
        self.ignore_repeats = ignore_repeats
        self.signal: Optional[int] = None
        self._raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def interruptible(self) -> "_Interruptible":
        return _Interruptible(self)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 without one."""
        return 128 + self.signal if self.signal else 0

    def _handle(self, number: int, _: Optional[FrameType]) -> None:
        if self.signal is None:
            self.signal = number
        elif not self.ignore_repeats:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self._raise:
            self._raise = False
            raise Interrupted


class _Interruptible:
    def __init__(self, stopper: StopSignal) -> None:
        self._stopper = stopper

    def __enter__(self) -> None:
        self._stopper._raise = True
        if self._stopper.signal is not None:
            self._stopper._raise = False
            raise Interrupted

    def __exit__(self, *_: object) -> None:
        self._stopper._raise = False
