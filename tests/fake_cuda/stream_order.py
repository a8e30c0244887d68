"""Is every access to memory ordered after the conflicting ones on other streams?

The book-keeping is that of torch.cuda._sanitizer, which on a GPU reads the driver's trace. Here it
is told of each operator and launch on fake tensors, and of what streams and the host wait for.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import sys
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.cuda import _sanitizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_cuda import streams
from benchmarks.fake_cuda.fake_tensors import is_locked, tensors_of
from tests.fake_cuda.watch import Launch

HOST = -1  # the host's accesses to page-locked memory are those of a stream
MOMENT = -2  # an event
NAMED = tuple(f"{streams.ROOT}/{path}" for path in ("fastirt/", "kernels/", "tests/fake_cuda/streams_proof.py"))
WRITTEN = {"gather_kernel": {"out_ptr"}}  # arguments that a kernel writes
Accesses = tuple[str, set[Any], set[Any]]  # what, memory read, memory written


class Order(TorchDispatchMode):
    """Use it within a FakeTensorMode.

    Memory is handed out as torch's allocator may do in the worst case: what a stream frees, its
    next tensor of that size gets at once, unless `record_stream` told of another stream's use. A
    replay makes the accesses of the captured body, on its own stream.

    Attributes:
        races: accesses in no order, each with both operators and their lines.
        rows: the images that a gather from a cache reads next.
    """

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.races: list[str] = []
        self.rows: Any = ()
        self._launches = launches
        self._handler, self._numbers = _sanitizer.EventHandler(), itertools.count(1)
        self._handler.syncs.create_stream(HOST)
        self._held: dict[int, tuple[StorageWeakRef, int, tuple | None]] = {}  # by storage: weak, block, kind
        self._free: dict[tuple, list[int]] = collections.defaultdict(list)
        self._users: dict[int, set[int]] = collections.defaultdict(set)  # by storage, from record_stream
        self._caches: dict[int, np.ndarray] = {}  # by storage: where its images begin
        self._images: dict[tuple[int, int], int] = {}  # (storage, image) to a block
        self._body: list[Accesses] = []

    def __enter__(self) -> "Order":
        record_stream: Callable = Tensor.record_stream

        def recorded(tensor: Tensor, stream: Any) -> None:
            self._users[tensor.untyped_storage()._cdata].add(stream.number)
            record_stream(tensor, stream)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(Tensor, "record_stream", recorded))
        # The sanitizer keeps a stack for each access, which takes most of the time.
        stacks = SimpleNamespace(StackSummary=SimpleNamespace(extract=lambda *_, **__: []), walk_stack=lambda _: [])
        self._patches.enter_context(mock.patch.object(_sanitizer, "traceback", stacks))
        streams.listeners.append(self._told)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        streams.listeners.remove(self._told)
        self._patches.close()

    def add_cache(self, pixels: Tensor, starts: np.ndarray) -> None:
        """Tell the images of a decoded cache apart: steps read some while others are written."""
        self._caches[pixels.untyped_storage()._cdata] = starts

    def host_reads(self, what: str, pixels: Tensor, images: Any) -> None:
        """The host counts on images of a cache."""
        self._launch(HOST, (f"{what} at {_place()}", {self._image(pixels, image) for image in images}, set()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return out
        given = [tensor for tensor in tensors_of(args, kwargs) if _is_shared(tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        made = [t for t in tensors_of(out) if _is_shared(t) and t.untyped_storage()._cdata not in known]
        arguments = zip(args, func._schema.arguments)
        written = tensors_of([a for a, s in arguments if s.alias_info is not None and s.alias_info.is_write])
        written = [tensor for tensor in written if _is_shared(tensor)] + made
        outputs = {self._block(tensor) for tensor in written}  # allocates
        if not written or "empty" in str(func):  # views and allocations access nothing
            return out
        on_host = not any(tensor.is_cuda for tensor in (*given, *made))
        stream = HOST if on_host else streams.current_stream().number
        self._access(stream, (f"{func} at {_place()}", {self._block(tensor) for tensor in given}, outputs))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and _waits(args, kwargs, out):
            self._handler._handle_stream_synchronization(stream)
        return out

    def _told(self, event: tuple) -> None:
        what, *rest = event
        handler = self._handler
        if what == "launch":
            self._launched(self._launches.pop())  # it would keep its tensors
        elif what == "record":
            handler._handle_event_record(*rest)
        elif what == "wait":
            handler._handle_event_wait(*rest)
        elif what == "wait_stream":
            self._wait(*rest)
        elif what == "host waits":
            kind, _, which = rest
            if kind == "device":
                handler._handle_device_synchronization()
            elif kind == "stream":
                handler._handle_stream_synchronization(which)
            else:
                handler._handle_event_synchronization(which)
        elif what == "capture begins":
            self._body = []
        elif what == "replay":
            for accesses in self._body:
                self._launch(streams.current_stream().number, accesses)

    def _launched(self, launch: Launch) -> None:
        tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
        writes = {self._block(tensors[name]) for name in WRITTEN[launch.name]}
        reads: set[Any] = set()
        for tensor in tensors.values():
            cached = tensor.untyped_storage()._cdata in self._caches
            reads.add(tensor if cached else self._block(tensor))
        self._access(streams.current_stream().number, (f"{launch.name} at {_place()}", reads, writes))

    def _access(self, stream: int, accesses: Accesses) -> None:
        if streams.is_capturing() and stream != HOST:
            self._body.append(accesses)
        else:
            self._launch(stream, accesses)

    def _launch(self, stream: int, accesses: Accesses) -> None:
        what, reads, writes = accesses
        caches = [pixels for pixels in reads if isinstance(pixels, Tensor)]
        of_images = {self._image(pixels, row) for pixels in caches for row in self.rows}
        reads = {block for block in reads if not isinstance(block, Tensor)} | of_images
        self._wait(stream, HOST)  # a launch follows what the host did before
        names: dict[int, list[str]] = collections.defaultdict(list)
        found = self._handler._handle_kernel_launch(stream, reads - writes, writes, writes, what, names)
        for race in found:
            now, before = race.current_access, race.previous_access
            self.races.append(
                f"{now.operator} on stream {now.stream} does not wait for {before.operator} on stream {before.stream}"
            )

    def _wait(self, waiting: int, awaited: int) -> None:
        handler = self._handler
        handler._handle_event_record(MOMENT, awaited)
        handler._handle_event_wait(MOMENT, waiting)

    def _block(self, tensor: Tensor) -> int:
        """The memory of a tensor; new memory where it has none yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._caches:
            starts = self._caches[key]
            return self._image(tensor, int(np.searchsorted(starts, tensor.storage_offset(), "right")) - 1)
        if key not in self._held:
            self._collect()
            size = -(-storage.nbytes() // 512)
            pool = "graph" if streams.is_capturing() else streams.current_stream().number
            kind = (pool, size) if tensor.is_cuda else None
            block = self._free[kind].pop() if self._free.get(kind) else next(self._numbers)
            self._held[key] = StorageWeakRef(storage), block, kind
        return self._held[key][1]

    def _collect(self) -> None:
        """Free the memory of tensors that are gone."""
        for key, (storage, block, kind) in list(self._held.items()):
            if storage.expired():
                del self._held[key]
                users = self._users.pop(key, set())
                if kind is not None and users <= {kind[0]}:
                    self._free[kind].append(block)

    def _image(self, pixels: Tensor, row: int) -> int:
        key = pixels.untyped_storage()._cdata, int(row)
        if key not in self._images:
            self._images[key] = next(self._numbers)
        return self._images[key]


def _is_shared(tensor: Tensor) -> bool:
    """Whether the device can access a tensor's memory."""
    return tensor.is_cuda or is_locked(tensor)


def _waits(args: Any, kwargs: dict[str, Any] | None, out: Tensor) -> bool:
    """Whether the host waits for a copy between it and the device."""
    crosses = len({tensor.is_cuda for tensor in tensors_of(args, out)}) > 1
    return crosses and not ((kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2]))


def _place() -> str:
    """The innermost line of the project or the proof: `file:line`. Cheaper than `streams.where`."""
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(NAMED):
        frame = frame.f_back
    path = frame.f_code.co_filename.removeprefix(f"{streams.ROOT}/")
    # An installation finds kernels/ in its place, a link in fastirt/.
    return f"{path.replace('fastirt/kernels/', 'kernels/')}:{frame.f_lineno}"
