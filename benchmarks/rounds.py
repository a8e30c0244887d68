"""Training steps of several contenders in turns; within its turn a contender's steps run back to
back, as in a training run."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Callable, Iterable, NamedTuple

import torch

from benchmarks.timing import peak, reason, release, time_interleaved


class Rounds(NamedTuple):
    """seconds: of one step, a value a round. peak_bytes: peak of the device's memory, beyond what
    was allocated before; None where it is unknown."""

    seconds: list[float]
    peak_bytes: int | None


def run_interleaved(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int, steps: int, warm_up: int = 6
) -> dict[str, Rounds | str]:
    """Time `steps` steps of each contender in each of `rounds` rounds, after `warm_up` untimed.

    The device is synchronized only at the start and the end of a turn. A contender that fails has
    its error as a string in place of its times.
    """
    outcomes: dict[str, Rounds | str] = {}
    for name, step in contenders.items():
        try:
            outcomes[name] = Rounds([], peak(partial(repeated, step, warm_up), device))
        except Exception as error:
            outcomes[name] = reason(error)
            release(device)
    for _ in range(rounds):
        for name, step in contenders.items():
            outcome = outcomes[name]
            if isinstance(outcome, str):
                continue
            try:
                outcome.seconds.append(_turn(step, device, steps))
            except Exception as error:
                outcomes[name] = reason(error)
                release(device)
    return outcomes


def _turn(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Seconds of one step, averaged over `steps`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    repeated(step, steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def repeated(step: Callable[[], Any], steps: int) -> None:
    """Do `steps` steps."""
    for _ in range(steps):
        step()


def milliseconds(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int, passes: int, steps: int
) -> dict[str, list[float] | str]:
    """Of one pass, by name, timed in turns; an error as a string.

    On a GPU each call is a CUDA graph of `passes` passes, since launches from Python take longer
    than the kernels; on a CPU it is one pass, of which a turn has `steps`.
    """
    if device.type == "cuda":
        timed = time_interleaved(calls, device, repeats, graphs=calls)[0]
        return {k: v if isinstance(v, str) else [ms / passes for ms in v] for k, v in timed.items()}
    rounds = run_interleaved(calls, device, repeats, steps)
    return {k: v if isinstance(v, str) else [1e3 * seconds for seconds in v.seconds] for k, v in rounds.items()}


def profiled(step: Callable[[], Any], device: torch.device) -> tuple[dict[str, int], dict[str, float]]:
    """Of one step: (the host's launches and the device's work, {"launches", "kernels", "copies"};
    the device's microseconds by kernel).

    On a CPU ({"operators"}, {}).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    averages = list(profile.key_averages())
    return counted(averages, device), kernel_us(averages)


def kernel_us(events: Iterable[Any]) -> dict[str, float]:
    """Microseconds on the device by the kernel's name, without named spans."""
    cuda = torch.profiler.DeviceType.CUDA
    kernels = [event for event in events if event.device_type == cuda and not _is_span(event)]
    return {event.key: float(event.self_device_time_total) for event in kernels}


def counted(events: Iterable[Any], device: torch.device) -> dict[str, int]:
    """The counts of `profiled`, from a profiler's averages.

    Named spans (`record_function`, `Optimizer.step`) are left out: they are not kernels.
    """
    events = [event for event in events if not _is_span(event)]
    if device.type != "cuda":
        return {"operators": sum(event.count for event in events if event.key.startswith("aten::"))}
    host = sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")))
    on_device = [event for event in events if event.device_type == torch.profiler.DeviceType.CUDA]
    copies = sum(event.count for event in on_device if event.key.startswith(("Memcpy", "Memset")))
    return {"launches": host, "kernels": sum(event.count for event in on_device) - copies, "copies": copies}


def _is_span(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False))
