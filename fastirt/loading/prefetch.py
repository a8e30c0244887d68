"""Batches made ahead of a GPU's step, in a background thread and on its own CUDA stream."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Any, Generator, Generic, Iterator, Protocol, TypeVar

import torch
from torch import Tensor

from fastirt.images.bad_images import BadRows
from fastirt.loading.batch import Batch

T = TypeVar("T")
POLL = 0.1  # seconds between checks that the other thread is alive
PREFETCH = 2  # batches ready ahead of the step


class DeviceStream:
    """The CUDA stream of background work; the model runs on another one.

    On a CPU it does nothing.
    """

    def __init__(self, device: torch.device, pin_memory: bool = True) -> None:
        self.device, self.pin_memory = torch.device(device), pin_memory
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def active(self) -> Any:
        """A context in which this thread queues its device work here."""
        return torch.cuda.stream(self._stream)

    def upload(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, complete after `wait`."""
        if self._stream is None or tensor.device.type != "cpu":
            return tensor
        return (tensor.pin_memory() if self.pin_memory else tensor).to(self.device, non_blocking=True)

    def wait(self) -> None:
        """Block until the device has done all the work queued here."""
        if self._stream is not None:
            self._stream.synchronize()


class Images(Protocol):
    """A loader's source of images: threads and decoders to open and close, and the bad rows."""

    stream: DeviceStream
    bad: BadRows

    def open(self) -> None: ...

    def close(self) -> None: ...


class BackgroundLoader(ABC):
    """Iterating runs `batches`: for a GPU in a background thread, on a CPU in the consumer's.

    Ranks have the thread on a CPU too: the main one must name a lost rank before it is stopped.
    On a CPU all cores work on the step; decoding beside it would hold up the threads that share a
    product, so that a step and a batch take longer than one after the other. Files are read ahead
    on both. There is one iteration at a time.
    """

    def __init__(self, images: Images) -> None:
        # Weak, so that a consumer that leaves its loop stops the thread.
        self._running: weakref.ref[Prefetch[Batch] | Generator[Batch, None, None]] | None = None
        self.images = images

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """Make the batches one by one, in the calling thread; `images` must be open."""

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self.images.open()
        on_gpu = self.images.stream.device.type == "cuda"
        in_thread = on_gpu or self.images.bad.ranks.is_distributed
        running = Prefetch(self._on_stream(), PREFETCH) if in_thread else self._on_stream()
        self._running = weakref.ref(running)
        return _recorded(running) if on_gpu else running

    @property
    def bad(self) -> set[int]:
        """Rows of the split known to be unreadable."""
        return set(self.images.bad.rows)

    def close(self) -> None:
        """Stop the iteration and free what it used. Iterating again starts afresh."""
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self.images.close()

    def _on_stream(self) -> Generator[Batch, None, None]:
        with self.images.stream.active():
            yield from self.batches()


def _recorded(batches: Prefetch[Batch]) -> Iterator[Batch]:
    """Batches, after telling torch's allocator that the consumer's stream uses their memory.

    Without this, memory of the background stream is reused while the step still reads it.
    """
    for batch in batches:
        views = batch.views
        for tensor in (batch.labels, views.starts, views.widths, views.picks, views.per_batch):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        yield batch


class Prefetch(Generic[T]):
    """Runs `items` in a thread and keeps at most `depth` of them ready.

    An exception in the thread is raised to the consumer, after the items before it. The thread is
    stopped by `close`, by the loss of the last reference, and at the end of the interpreter.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue = queue.Queue(depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(items, self._queue, stop), name="fastirt-input", daemon=True
        )
        self._thread.start()
        self._halt = weakref.finalize(self, _halt, self._thread, stop)
        # atexit is last in, first out: stop the thread before the libraries it uses shut down
        atexit.register(self._halt)

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        while self._halt.alive:
            try:
                item, error = self._queue.get(timeout=POLL)
            except queue.Empty:
                if self._thread.is_alive() or not self._queue.empty():
                    continue
                break
            if error is None:
                return item
            self.close()
            raise error
        raise StopIteration

    def close(self) -> None:
        self._halt()
        atexit.unregister(self._halt)


def _produce(items: Iterator, ready: queue.Queue, stop: threading.Event) -> None:
    def offer(item: object, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=POLL)
            except queue.Full:
                pass

    try:
        for item in items:
            offer(item, None)
            if stop.is_set():
                return
        offer(None, StopIteration())
    except BaseException as error:  # raised again in the consumer
        offer(None, error)


def _halt(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
