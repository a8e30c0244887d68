"""Streams, events and graphs without a driver: they write down what they are told."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

ROOT = Path(__file__).resolve().parents[2]
_hidden = set(Path(__file__).resolve().parent.glob("*.py"))  # not named in `where`

# (what, ...) in order: ("record", event, stream), ("wait", event, stream), ("wait_stream", waiting,
# awaited), ("capture begins", stream), ("capture ends",), ("replay", graph), ("launch", kernel,
# stream), and ("host waits", for what, where, which). Streams are numbers, 0 is the default stream;
# events and graphs are ids.
events: list[tuple] = []
listeners: list[Callable[[tuple], None]] = []  # called with each event
_capturing: list[int] = []  # the stream that is captured now
_numbers = itertools.count(1)


def tell(*event: Any) -> None:
    events.append(event)
    for listener in listeners:
        listener(event)


def hide(file: str) -> None:
    """Leave the lines of a file out of `where`: it is a tool of the tests, not the project."""
    _hidden.add(Path(file).resolve())


def where(depth: int = 3) -> str:
    """The project's innermost lines that led here, the last first: `file:line < file:line`."""
    return lines_of(traceback.extract_stack(), depth)


def lines_of(frames: traceback.StackSummary, depth: int = 3) -> str:
    """The project's innermost lines of a stack, the last first."""
    named = []
    for frame in frames:
        path = Path(frame.filename)
        # a virtual environment may lie in the project's folder
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path not in _hidden:
            named.append(f"{path.relative_to(ROOT)}:{frame.lineno}")
    return " < ".join(reversed(named[-depth:]))


def host_waits() -> list[str]:
    """Each wait of the host since `events` was emptied: for what, and where."""
    return [f"the host waits for the {event[1]} at {event[2]}" for event in events if event[0] == "host waits"]


def wait_on_host(what: str, which: int | None = None) -> None:
    if _capturing:  # as CUDA does
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing (the host waits for {what})")
    tell("host waits", what, where(), which)


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.stream: Any = None
        self.options = options

    def record(self, stream: Any = None) -> None:
        self.stream = stream or current_stream()
        tell("record", id(self), self.stream.number)

    def wait(self, stream: Any = None) -> None:
        tell("wait", id(self), (stream or current_stream()).number)

    def synchronize(self) -> None:
        wait_on_host("event", id(self))

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        if self.stream is None or end.stream is None:
            raise RuntimeError("both events must be recorded before their times are compared")
        return 1.0


class Stream:
    """torch.cuda.Stream; `number` stands for its handle."""

    device_index, device_type = 0, 1

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None, **_: Any) -> None:
        self.number = next(_numbers) if number is None else number
        self.device = torch.device("cuda:0")
        self.cuda_stream = self.stream_id = self.number

    def wait_stream(self, other: "Stream") -> None:
        tell("wait_stream", self.number, other.number)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        wait_on_host("stream", self.number)

    def query(self) -> bool:
        return True


class Graph:
    """torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        tell("replay", id(self))


class Device:
    """torch.cuda.device: a context, and a class because dynamo asks for one."""

    def __init__(self, index: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


_current = [Stream(number=0)]


def current_stream(device: Any = None) -> Stream:
    return _current[-1]


def default_stream(device: Any = None) -> Stream:
    return _current[0]


def set_stream(stream: Stream) -> None:
    _current[-1] = stream


@contextlib.contextmanager
def as_thread(current: list[Stream]) -> Iterator[None]:
    """Work as a thread whose current stream is the last of a list."""
    global _current
    before, _current = _current, current
    try:
        yield
    finally:
        _current = before


def is_capturing() -> bool:
    return bool(_capturing)


@contextlib.contextmanager
def stream_context(of: Stream | None) -> Iterator[None]:
    _current.append(of if of is not None else _current[-1])
    try:
        yield
    finally:
        _current.pop()


@contextlib.contextmanager
def graph_context(
    graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    stream = stream or Stream()
    tell("capture begins", stream.number)
    _capturing.append(stream.number)
    try:
        with stream_context(stream):
            yield
    finally:
        _capturing.pop()
        tell("capture ends")
