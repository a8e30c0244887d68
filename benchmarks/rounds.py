"""Steps of several contenders in turns, each back to back within its turn, as a run makes them."""

from __future__ import annotations

import time
from typing import Any, Callable, NamedTuple

import torch

OUT_OF_MEMORY = "out of memory"


class Rounds(NamedTuple):
    """seconds: of a step, one value a round. peak_bytes: device memory at its peak beyond what was there (None: not known)."""

    seconds: list[float]
    peak_bytes: int | None


def in_turns(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int, steps: int, warm_up: int = 6
) -> dict[str, Rounds | str]:
    """Each contender `steps` times in each of `rounds` rounds, after `warm_up` unmeasured ones; the device is waited for at the ends
    of a turn only. One that runs out of memory gives the words "out of memory"."""
    found: dict[str, Rounds | str] = {}
    for name, step in contenders.items():
        try:
            found[name] = Rounds([], _warm_up(step, device, warm_up))
        except torch.OutOfMemoryError:
            found[name] = OUT_OF_MEMORY
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, step in contenders.items():
            if isinstance(found[name], str):
                continue
            try:
                found[name].seconds.append(_turn(step, device, steps))
            except torch.OutOfMemoryError:
                found[name] = OUT_OF_MEMORY
                torch.cuda.empty_cache()
    return found


def _warm_up(step: Callable[[], Any], device: torch.device, count: int) -> int | None:
    if device.type != "cuda":
        for _ in range(count):
            step()
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(count):
        step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _turn(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def launches(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """What the host launches in one step and what the device then runs: {"launches", "kernels"}; on a CPU {"operators"}."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profile.key_averages()
    if device.type != "cuda":
        return {"operators": sum(event.count for event in events if event.key.startswith("aten::"))}
    host = sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")))
    kernels = sum(e.count for e in events if e.device_type == torch.profiler.DeviceType.CUDA)
    return {"launches": host, "kernels": kernels}
