"""torch.cuda without a driver: streams, events and graphs write down what they are told."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import torch

from tests.fake_cuda import fake_tensors

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(__file__).resolve().parent
OWN_TOOLS = {"streams.py", "fake_tensors.py", "watch.py", "driver.py", "step_proof.py", "run.py"}

# (what, ...) in order: ("record", event, stream), ("wait", event, stream), ("wait_stream", waiting,
# awaited), ("capture begins", stream), ("capture ends",), ("replay", graph), ("launch", kernel,
# stream), and ("host waits", for what, where). Streams are numbers, 0 is the default stream; events
# and graphs are ids.
events: list[tuple] = []
_capturing: list[int] = []  # the stream that is captured now
_numbers = itertools.count(1)


def where(depth: int = 3) -> str:
    """The project's innermost lines that led here, the last first: `file:line < file:line`."""
    return lines_of(traceback.extract_stack(), depth)


def lines_of(frames: traceback.StackSummary, depth: int = 3) -> str:
    """The project's innermost lines of a stack, the last first."""
    named = []
    for frame in frames:
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not (path.parent == TOOLS and path.name in OWN_TOOLS):
            named.append(f"{path.relative_to(ROOT)}:{frame.lineno}")
    return " < ".join(reversed(named[-depth:]))


def host_waits() -> list[str]:
    """Each wait of the host since `events` was emptied: for what, and where."""
    return [f"the host waits for the {event[1]} at {event[2]}" for event in events if event[0] == "host waits"]


def _wait_on_host(what: str) -> None:
    if _capturing:  # as CUDA does
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing (the host waits for {what})")
    events.append(("host waits", what, where()))


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.stream: Any = None
        self.options = options

    def record(self, stream: Any = None) -> None:
        self.stream = stream or torch.cuda.current_stream()
        events.append(("record", id(self), self.stream.number))

    def wait(self, stream: Any = None) -> None:
        events.append(("wait", id(self), (stream or torch.cuda.current_stream()).number))

    def synchronize(self) -> None:
        _wait_on_host("event")

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
        events.append(("wait_stream", self.number, other.number))

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _wait_on_host("stream")

    def query(self) -> bool:
        return True


class Graph:
    """torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        events.append(("replay", id(self)))


class Device:
    """torch.cuda.device: a context, and a class because dynamo asks for one."""

    def __init__(self, index: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


_current = [Stream(number=0)]


@contextlib.contextmanager
def _stream(of: Stream | None) -> Iterator[None]:
    _current.append(of if of is not None else _current[-1])
    try:
        yield
    finally:
        _current.pop()


@contextlib.contextmanager
def _graph(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    stream = stream or Stream()
    events.append(("capture begins", stream.number))
    _capturing.append(stream.number)
    try:
        with _stream(stream):
            yield
    finally:
        _capturing.pop()
        events.append(("capture ends",))


def _host_register(pointer: int, size: int, flags: int) -> int:
    fake_tensors.lock(pointer)
    return 0


def replace(properties: SimpleNamespace) -> None:
    """Put all of this into torch.cuda, torch._C and dynamo's table of devices."""
    # dynamo makes tables of torch's functions when they are imported: they must be the true ones
    import torch._dynamo.device_interface as interface
    import torch._dynamo.trace_rules as rules

    rules.get_torch_obj_rule_map()
    functions = _functions(properties)
    for name, value in functions.items():
        setattr(torch.cuda, name, value)
    # What C++ would answer from the driver. The last two are called where a capture fails.
    torch._C._cuda_getCurrentRawStream = lambda index: _current[-1].number
    torch._C._cuda_getDeviceCount = lambda: 1
    torch._C._cuda_endAllocateToPool = lambda *_: None
    torch._C._cuda_releasePool = lambda *_: None
    _replace_interface(interface, functions, properties)


def _nothing() -> Callable[..., None]:
    """A new function each time: dynamo's tables refuse one function under two names."""
    return lambda *_, **__: None


def _functions(properties: SimpleNamespace) -> dict[str, Any]:
    state = torch.zeros(16, dtype=torch.uint8)
    return dict(
        # autocast("cuda") switches itself off without is_available, and FakeTensorMode would
        # allocate a real tensor to initialize CUDA
        is_available=lambda: True,
        is_initialized=lambda: True,
        init=_nothing(),
        _lazy_init=_nothing(),
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=_nothing(),
        device=Device,
        _exchange_device=lambda *_: 0,
        _maybe_exchange_device=lambda *_: 0,
        get_device_properties=lambda *_: properties,
        get_device_capability=lambda *_: (properties.major, properties.minor),
        get_device_name=lambda *_: properties.name,
        is_bf16_supported=lambda *_, **__: True,
        mem_get_info=lambda *_: (properties.total_memory, properties.total_memory),
        memory_allocated=lambda *_: 0,
        empty_cache=_nothing(),
        synchronize=lambda *_, **__: _wait_on_host("device"),
        current_stream=lambda *_: _current[-1],
        default_stream=lambda *_: _current[0],
        set_stream=lambda stream: _current.__setitem__(-1, stream),
        stream=_stream,
        Stream=Stream,
        Event=Event,
        CUDAGraph=Graph,
        graph=_graph,
        graph_pool_handle=lambda: (0, 1),
        is_current_stream_capturing=lambda: bool(_capturing),
        manual_seed=_nothing(),
        manual_seed_all=_nothing(),
        default_generators=(torch.Generator(),),
        get_rng_state=lambda *_: state,
        set_rng_state=_nothing(),
        cudart=lambda: SimpleNamespace(cudaHostRegister=_host_register, cudaHostUnregister=fake_tensors.unlock),
    )


def _replace_interface(interface: Any, functions: dict[str, Any], properties: SimpleNamespace) -> None:
    """Dynamo and inductor ask for devices through this class, which holds the true functions."""
    found = interface.CudaInterface
    for name in ("current_device", "set_device", "device_count", "stream", "current_stream", "set_stream"):
        setattr(found, name, staticmethod(functions[name]))
    for name in ("synchronize", "get_device_properties", "is_bf16_supported"):
        setattr(found, name, staticmethod(functions[name]))
    found.get_raw_stream = staticmethod(lambda index: _current[-1].number)
    found.exchange_device = found.maybe_exchange_device = staticmethod(lambda *_: 0)
    found.Event, found.Stream, found.device = Event, Stream, Device
    interface.caching_worker_device_properties["cuda"] = [properties]
    interface.caching_worker_current_devices["cuda"] = 0
