"""Times callables alternately in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import contextlib
import gc
import time
from pathlib import Path
from typing import Any, Callable, Collection, Optional, Sequence

import torch

from fastirt.errors import first_line
from fastirt.step.cuda_graph import captured

FLUSH_BYTES = 256 << 20  # more than any L2 cache
OUT_OF_MEMORY = "out of memory"


def reason(error: BaseException) -> str:
    """Why something was not run, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    # the name again where there is no message
    name, message = type(error).__name__, first_line(error)
    return name if message == name else f"{name}: {message}"


def release(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        # After a failed kernel every later CUDA call raises the same error again.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def peak(call: Callable[[], Any], device: torch.device) -> Optional[int]:
    """Run `call`; its peak of memory in bytes, beyond what was allocated before.

    On a CPU it is the process's resident memory, and None where the system does not tell it.
    """
    if device.type != "cuda":
        before = _resident_peak()
        call()
        after = None if before is None else _resident_peak(reset=False)
        return None if after is None else max(0, after - before)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(reset: bool = True) -> Optional[int]:
    """Largest resident memory in bytes since the last reset; Linux alone tells it."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        return None


def time_interleaved(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 20, graphs: Collection[str] = ()
) -> tuple[dict[str, list[float] | str], dict[str, Optional[int]]]:
    """(milliseconds of each call's `repeats` runs, its peak of device memory in bytes).

    The calls run in turns, after three unmeasured runs each; on a GPU with a cold L2 cache. A call
    that fails has a string in place of its times: "out of memory", or its error. A peak is beyond
    what was allocated before, and None where it is unknown, as on a CPU.

    A GPU call starts on an idle device, so its time includes the host's launches where these are
    slower than the kernels. `graphs` names the calls that replay CUDA graphs: they are queued
    behind the flush of the cache, so their time is the device's alone. Their peak is unknown: a
    graph's memory is allocated when it is captured.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None
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
    outcomes: dict[str, list[float] | str] = {**times, **failed}
    return {name: outcomes[name] for name in calls}, peaks


def turns(names: Sequence[str], device: torch.device) -> list[tuple[list[str], list[str]]]:
    """[(names whose figures are due, names to time in turns)], in order.

    On a GPU the first alone, then each other beside it, so that the end of a lease costs the figure
    that was being measured and no other. On a CPU all at once: its other load changes.
    """
    if device.type != "cuda" or not names:
        return [(list(names), list(names))]
    first, *others = names
    return [([first], [first]), *(([name], [name, first]) for name in others)]


def _once(call: Callable[[], Any], flush: Optional[torch.Tensor], wait: bool) -> float:
    """Milliseconds of one run. `flush`: read first, so that the L2 cache holds nothing of the call.
    `wait`: let the flush end before the call is launched."""
    if flush is None:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    flush.sum()  # written lines would have to go back to memory during the call
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if wait:
        torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def as_cuda_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call as one CUDA graph. Its results are the same tensors every time: the next call
    overwrites them."""
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
