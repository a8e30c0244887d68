"""The device that a rank runs on."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError


def choose_device(name: str | None, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """The device that --device names, or a GPU if there is one; becomes torch's current device.

    In a distributed job each rank takes the GPU of its local rank. Raises UserError naming the
    devices present.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    present = [*gpus, "cpu"]
    if ranks.is_distributed and name and ":" in name:
        raise UserError(
            f"--device {name}: {ranks.world_size} ranks cannot all have it: leave it out, or pass --device cuda or cpu"
        )
    if ranks.is_distributed and gpus and name in (None, "cuda"):
        name = gpus[ranks.local_rank % len(gpus)]
    name = name or (gpus[0] if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; present: {', '.join(present)}") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda:0")
    if str(device) not in present:
        raise UserError(f"--device {name}: no such device; present: {', '.join(present)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


# Of glibc's malloc.h: the number of blocks that are mapped, and free bytes that stay at the top.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> None:
    """Let malloc keep what a step frees for the next one; only glibc has this setting.

    glibc maps a block above 32 MiB by itself and unmaps it when it is freed, so that the system
    must clear its pages again in each step: a seventh of a step of DeiT-tiny at 224 pixels.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        if library.mallopt(M_MMAP_MAX, 0):
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
