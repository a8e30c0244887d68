"""The backend of the collectives: NCCL where each rank has a GPU to itself, else gloo."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from fastirt.distributed.failures import shared_error

log = logging.getLogger("fastirt")


def choose_backend(store: dist.Store, rank: int, world_size: int, device: torch.device) -> str:
    """The same on all ranks. Raises UserError where some ranks have a GPU and others have none."""
    store.set(f"gpu/{rank}", device_identity(device))
    gpus = [gpu.decode() for gpu in store.multi_get([f"gpu/{other}" for other in range(world_size)])]
    without = [str(other) for other, gpu in enumerate(gpus) if not gpu]
    if not any(gpus):
        return "gloo"
    if without:
        raise shared_error(
            f"rank {', '.join(without)} runs on a CPU, others on GPUs: mend its node's driver, or pass --device cpu",
            rank,
        )
    if len(set(gpus)) < world_size:
        if rank == 0:
            log.warning("%d ranks share %d GPUs: gloo instead of NCCL, slowly", world_size, len(set(gpus)))
        return "gloo"
    return "nccl"


def device_identity(device: torch.device) -> str:
    """The UUID of a GPU; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
