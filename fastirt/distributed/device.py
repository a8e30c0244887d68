"""The device that a rank runs on."""

from __future__ import annotations

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
    return device
