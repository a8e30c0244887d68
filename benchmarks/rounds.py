"""Steps of several contenders in turns, each back to back within its turn, as a run makes them."""

from __future__ import annotations

import time
from typing import Any, Callable, Iterable, NamedTuple

import torch

from benchmarks.timing import peak, reason, release


class Rounds(NamedTuple):
    """seconds: of a step, one value a round. peak_bytes: device memory at its peak beyond what was there (None: not known)."""

    seconds: list[float]
    peak_bytes: int | None


def in_turns(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int, steps: int, warm_up: int = 6
) -> dict[str, Rounds | str]:
    """Each contender `steps` times in each of `rounds` rounds, after `warm_up` unmeasured ones; the device is waited for at the ends
    of a turn only. One that fails gives the words why."""
    found: dict[str, Rounds | str] = {}
    for name, step in contenders.items():
        try:
            found[name] = Rounds([], peak(lambda step=step: [step() for _ in range(warm_up)], device))
        except Exception as error:
            found[name] = reason(error)
            release(device)
    for _ in range(rounds):
        for name, step in contenders.items():
            if isinstance(found[name], str):
                continue
            try:
                found[name].seconds.append(_turn(step, device, steps))
            except Exception as error:
                found[name] = reason(error)
                release(device)
    return found


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
    """What the host launches in one step and what the device then runs: {"launches", "kernels", "copies"}; on a CPU {"operators"}."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return counted(profile.key_averages(), device)


def counted(events: Iterable[Any], device: torch.device) -> dict[str, int]:
    """Of a profiler's averages; spans that a program or the profiler named itself are no kernels."""
    events = [event for event in events if not getattr(event, "is_user_annotation", False)]
    if device.type != "cuda":
        return {"operators": sum(event.count for event in events if event.key.startswith("aten::"))}
    host = sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")))
    ran = [event for event in events if event.device_type == torch.profiler.DeviceType.CUDA]
    copies = sum(event.count for event in ran if event.key.startswith(("Memcpy", "Memset")))
    return {"launches": host, "kernels": sum(event.count for event in ran) - copies, "copies": copies}
