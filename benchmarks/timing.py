"""Times callables alternately in one process."""

from __future__ import annotations

import contextlib
import gc
import time
from typing import Any, Callable, Collection, Optional

import torch

from fastirt.errors import first_line
from fastirt.step.cuda_graph import captured

FLUSH_BYTES = 256 << 20  # more than any L2
OUT_OF_MEMORY = "out of memory"


def reason(error: BaseException) -> str:
    """Why something was not run, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else ''}"


def release(device: torch.device) -> None:
    """Give the device's memory back that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a failed kernel is reported again by every later call
            torch.cuda.empty_cache()


def peak(call: Callable[[], Any], device: torch.device) -> Optional[int]:
    """Call it; bytes of device memory at its peak beyond what was there before, None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def samples(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 20, graphs: Collection[str] = ()
) -> tuple[dict[str, list[float] | str], dict[str, Optional[int]]]:
    """(milliseconds of each call's `repeats` calls, bytes of device memory at its peak beyond what was there before).

    Taken in turns, after three unmeasured ones; on a GPU with a cold L2. A call that fails gives the words why: "out of
    memory", or the error's. A peak is None where it is not known, as on a CPU.

    A GPU call is timed from an idle device, so the time includes the host's launches where these are the slower part. `graphs`
    names replays of CUDA graphs: they are queued behind the flush, so theirs is the device's time alone; what a graph holds was
    allocated when it was captured, so its peak is not known.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    failed: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    peaks: dict[str, Optional[int]] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            peaks[name] = None if name in graphs or device.type != "cuda" else peak(call, device)
            times[name] = []
        except Exception as error:
            failed[name] = reason(error)
            release(device)
    for _ in range(repeats):
        for name in list(times):
            try:
                times[name].append(_once(calls[name], flush, wait=name not in graphs))
            except Exception as error:
                failed[name] = reason(error)
                del times[name]
                release(device)
    found = {**times, **failed}
    return {name: found[name] for name in calls}, peaks


def _once(call: Callable[[], Any], flush: Optional[torch.Tensor], wait: bool) -> float:
    """Milliseconds; `wait`: for the flush, before the call is launched."""
    if flush is None:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if wait:
        torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def as_cuda_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call as one CUDA graph. Its results are the same tensors every time: the next call overwrites them."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    results: list[Any] = []
    graph = captured(lambda: results.append(call()), torch.device("cuda", torch.cuda.current_device()))

    def replay() -> Any:
        graph.replay()
        return results[0]

    return replay
