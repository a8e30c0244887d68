"""Milliseconds an image of exported files beside torch, in turns on one machine."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from fastirt.export.options import PIXELS
from fastirt.export.source import Source

BATCHES = (1, 32)
ROUNDS = 7
SECONDS = 20.0  # after which no further round begins, from the third on


def latencies(sessions: dict[str, Any], source: Source) -> dict[str, dict[int, float]]:
    """Median milliseconds an image by name and batch size, of sessions whose input are pixels.

    `torch` is the encoder in eager mode on its device.
    """
    size = source.encoder.input_size
    result: dict[str, dict[int, float]] = {name: {} for name in ("torch", *sessions)}
    for batch in BATCHES:
        pixels = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
        ways = {"torch": _eager(source, pixels)}
        for name, running in sessions.items():
            ways[name] = lambda running=running, pixels=pixels: running.run(None, {PIXELS: pixels})
        for name, seconds in _alternate(ways).items():
            result[name][batch] = 1000 * seconds / batch
    return result


def machine(device: torch.device) -> str:
    """Processor and threads, and the GPU of the encoder if it is on one, for the card."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    gpu = f"; torch on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{name}, threads: {torch.get_num_threads()}{gpu}"


def _eager(source: Source, pixels: np.ndarray) -> Callable[[], Any]:
    images = torch.from_numpy(pixels)

    @torch.inference_mode()
    def run() -> np.ndarray:
        return source.encoder(images.to(source.device)).cpu().numpy()

    return run


def _alternate(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, called in turns."""
    for call in ways.values():
        call()  # allocates
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for number in range(ROUNDS):
        if number >= 3 and time.perf_counter() - begin > SECONDS:
            break
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
