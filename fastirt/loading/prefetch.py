"""An iterator computed in a background thread, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from typing import Generic, Iterator, TypeVar

T = TypeVar("T")
POLL = 0.1  # seconds between looks at whether the other side is still there


class Prefetch(Generic[T]):
    """Runs `items` in a thread and keeps at most `depth` of them ready; an exception there is raised here, in its place.

    `close`, losing the last reference and the end of the interpreter all stop the thread and wait for it.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue = queue.Queue(depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(items, self._queue, stop), name="fastirt-input", daemon=True
        )
        self._thread.start()
        self._halt = weakref.finalize(self, _halt, self._thread, stop)
        atexit.register(
            self._halt
        )  # atexit is last in, first out: stop the thread before the libraries it uses shut down

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
    except BaseException as error:  # whatever it is, it belongs to the consumer
        offer(None, error)


def _halt(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
