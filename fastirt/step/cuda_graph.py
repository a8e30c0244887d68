"""One training step captured as a CUDA graph."""

from __future__ import annotations

import contextlib
from typing import Any, Callable

import torch

from fastirt.errors import UserError, first_line


class CaptureFailed(UserError):
    """Something in the step cannot be in a CUDA graph."""


WARM_UP = 3  # steps before the capture, in which libraries and the compiler set themselves up
DISTRIBUTED_WARM_UP = 11  # DistributedDataParallel times its buckets in the first ten


class Capture:
    """Runs `body` as it is for a few calls, then captures it in a CUDA graph and replays that.

    `body` must do the same work on the same addresses each time and never wait for the device.
    Call `forget` after anything that it uses has moved: the next calls warm up and capture again.
    """

    def __init__(self, device: torch.device, is_distributed: bool = False) -> None:
        """is_distributed: the body talks to other ranks."""
        self.device, self.enabled = device, True
        self.warm_up = DISTRIBUTED_WARM_UP if is_distributed else WARM_UP
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def stream(self) -> torch.cuda.StreamContext:
        """A context for work that must run on the stream of the capture."""
        return torch.cuda.stream(self._stream)

    def forget(self) -> None:
        self._graph, self._calls = None, 0

    def release(self) -> None:
        """Free the graph, once the device has run it."""
        torch.cuda.synchronize(self.device)
        self.forget()

    def __call__(self, body: Callable[[], None]) -> None:
        if not self.enabled or self._calls < self.warm_up:
            self._calls += 1
            self._warm_up(body)
            return
        if self._graph is None:
            self._capture(body)
        self._graph.replay()

    def _warm_up(self, body: Callable[[], None]) -> None:
        """Run on the capture's stream: autograd remembers where a weight was first used."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            body()
        current.wait_stream(self._stream)

    def _capture(self, body: Callable[[], None]) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # blocks of the warm-up: the graph has a pool of its own
        try:
            # thread_local: other threads decode images and call CUDA meanwhile.
            self._graph = captured(body, self.device, stream=self._stream, capture_error_mode="thread_local")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureFailed(
                f"--engine graph: the step cannot be captured ({first_line(error)}): use --engine compile"
            ) from error


def _leave_pool(device: torch.device, pool: Any) -> None:
    """A failed capture leaves the allocator routing frees to the graph's pool."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)


def captured(body: Callable[[], Any], device: torch.device, **options: Any) -> torch.cuda.CUDAGraph:
    """`body` as a CUDA graph; options are torch.cuda.graph's.

    If the capture fails, stream, allocator and random generator are restored, and the exception
    raised by `body` propagates.
    """
    graph, pool, cause = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), None
    scratch = torch.zeros(1, device=device)

    def watched() -> None:
        nonlocal cause
        try:
            body()
        except Exception as error:
            cause = error
            raise

    try:
        # `torch.cuda.graph` leaves its own stream current if ending the capture fails; the outer
        # context restores ours.
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph, pool=pool, **options):
            watched()
    except Exception as error:
        _leave_pool(device, pool)
        # torch 2.11 leaves the default generator in its capture mode, in which dropout outside a
        # capture raises. A capture that succeeds ends that mode; this one allocates nothing.
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(torch.cuda.current_stream(device)):
                with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool, **options):
                    scratch.zero_()
        except RuntimeError:
            _leave_pool(device, pool)
        raise cause or error
    return graph
