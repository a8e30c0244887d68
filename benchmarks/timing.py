"""Times callables alternately in one process."""

from __future__ import annotations

import time
from typing import Any, Callable, Collection, Optional

import torch

FLUSH_BYTES = 256 << 20  # more than any L2
OUT_OF_MEMORY = "out of memory"


def samples(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 20, graphs: Collection[str] = ()
) -> tuple[dict[str, list[float] | str], dict[str, Optional[int]]]:
    """(milliseconds of each call's `repeats` calls, bytes of device memory at its peak beyond what was there before).

    Taken in turns, after three unmeasured ones; on a GPU with a cold L2. A call that runs out of memory gives the words
    "out of memory". A peak is None where it is not known, as on a CPU.

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
            peaks[name] = None if name in graphs else _peak(call, device)
            times[name] = []
        except torch.OutOfMemoryError:
            failed[name] = OUT_OF_MEMORY
            torch.cuda.empty_cache()
    for _ in range(repeats):
        for name in list(times):
            try:
                times[name].append(_once(calls[name], flush, wait=name not in graphs))
            except torch.OutOfMemoryError:
                failed[name] = OUT_OF_MEMORY
                del times[name]
                torch.cuda.empty_cache()
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


def _peak(call: Callable[[], Any], device: torch.device) -> Optional[int]:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
