"""Times callables alternately in one process, and says on what."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Collection, NamedTuple, Optional

import torch

FLUSH_BYTES = 256 << 20  # more than any L2
OUT_OF_MEMORY = "out of memory"


class Timing(NamedTuple):
    """Milliseconds a call, and bytes of device memory at its peak beyond what was there before (None: not known, as on a CPU)."""

    median: float
    p20: float
    p80: float
    peak_bytes: Optional[int]


def alternate(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 20, graphs: Collection[str] = ()
) -> dict[str, Timing | str]:
    """Each call `repeats` times, in turns, after three unmeasured ones; on a GPU with a cold L2. A call that runs out of memory
    gives the words "out of memory".

    A GPU call is timed from an idle device, so the time includes the host's launches where these are the slower part. `graphs`
    names replays of CUDA graphs: they are queued behind the flush, so theirs is the device's time alone; what a graph holds was
    allocated when it was captured, so its peak is not known.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    results: dict[str, Timing | str] = {}
    times: dict[str, list[float]] = {}
    peaks: dict[str, Optional[int]] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            peaks[name] = None if name in graphs else _peak(call, device)
            times[name] = []
        except torch.OutOfMemoryError:
            results[name] = OUT_OF_MEMORY
            torch.cuda.empty_cache()
    for _ in range(repeats):
        for name in list(times):
            try:
                times[name].append(_once(calls[name], flush, wait=name not in graphs))
            except torch.OutOfMemoryError:
                results[name] = OUT_OF_MEMORY
                del times[name]
                torch.cuda.empty_cache()
    for name, values in times.items():
        steps = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
        results[name] = Timing(statistics.median(values), steps[0], steps[3], peaks[name])
    return {name: results[name] for name in calls}


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


def environment(device: torch.device) -> dict[str, str]:
    """What a result must say to be believed."""
    import triton

    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """Of this checkout, with "-dirty" where files have changed; "unknown" without git or its folder."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
