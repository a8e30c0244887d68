"""Which rank this process is, under torchrun or alone, and its connections to the other ranks.

Without torchrun there is one rank and every collective is a no-op. Three process groups keep
apart what must not wait for each other: `collectives` (NCCL on GPUs, gloo on CPUs) for the
step's tensors, `host` (gloo) for decisions of the host, `loader_host` (gloo) for the thread that
makes batches.
"""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist

from fastirt.distributed import failures
from fastirt.distributed.backend import choose_backend
from fastirt.distributed.collectives import Collectives
from fastirt.distributed.host_channel import HostChannel
from fastirt.distributed.rendezvous import rendezvous
from fastirt.errors import UserError, first_line

log = logging.getLogger("fastirt")

START_TIMEOUT = timedelta(minutes=10)
TIMEOUT = timedelta(minutes=30)  # for a rank that hangs; one that dies is noticed at once


class Ranks:
    """`rank` of `world_size`; `local_rank` of `local_world_size` on this node.

    `start` connects the ranks and `close` leaves; in between `collectives`, `host` and
    `loader_host` talk to the others.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.collectives = Collectives(rank, world_size)
        self.host, self.loader_host = HostChannel(rank, world_size), HostChannel(rank, world_size)
        self._peers: list[dict[str, Any]] = []

    @classmethod
    def from_environment(cls) -> "Ranks":
        """The rank that torchrun's variables describe; without them the only one.

        Raises UserError where some are missing.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "WORLD_SIZE" not in os.environ or "LOCAL_RANK" not in os.environ:
            return cls()  # a batch job alone sets some of them too
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise UserError(f"the environment lacks what torchrun sets ({', '.join(names)}): {error}") from None

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    @property
    def has_agent(self) -> bool:
        """Whether a launcher started this process: it repeats signals and kills by itself."""
        return self.is_distributed or "TORCHELASTIC_RUN_ID" in os.environ

    def threads(self, most: int) -> int:
        """At most so many, and no more than this rank's share of the node's cores."""
        return max(1, min(most, len(os.sched_getaffinity(0)) // self.local_world_size))

    def batch_slice(self, batch_size: int) -> tuple[int, int]:
        """(first, count): this rank's positions in a global batch."""
        count = batch_size // self.world_size
        return self.rank * count, count

    def shared_error(self, message: str) -> UserError:
        """An error that every rank raises and only rank 0 prints."""
        return failures.shared_error(message, self.rank)

    def as_peer_lost(self, error: BaseException) -> Optional[failures.PeerLost]:
        """The lost rank behind an exception of a collective; None for any other exception."""
        return failures.as_peer_lost(error, self.rank, self._peers) if self.is_distributed else None

    def start(self, device: torch.device) -> None:
        """Connect to the other ranks.

        Raises UserError where they do not come within `START_TIMEOUT`.
        """
        if not self.is_distributed or self._peers:
            return
        rank, world_size = self.rank, self.world_size
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
            store = rendezvous(store, rank, world_size, START_TIMEOUT)
            backend = choose_backend(store, rank, world_size, device)
            bound = {"device_id": device} if backend == "nccl" else {}
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT, **bound)
            self.collectives = Collectives(rank, world_size, backend, dist.group.WORLD)
            self.host, self.loader_host = (
                HostChannel(rank, world_size, dist.new_group(backend="gloo", timeout=TIMEOUT)) for _ in range(2)
            )
            self._peers = self.host.gather_json({"host": socket.gethostname(), "pid": os.getpid()})
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"rank {rank} of {world_size} cannot reach the others: {first_line(error)}") from error
        if self.is_main:
            hosts = len({peer["host"] for peer in self._peers})
            log.info("%d ranks on %d node%s, %s", world_size, hosts, "s" if hosts > 1 else "", backend)

    def close(self) -> None:
        """Wait for all ranks, then disconnect."""
        if self._peers:
            self.host.barrier()
            dist.destroy_process_group()
            self._peers = []


SINGLE_PROCESS = Ranks()  # a process that is the only rank; has no connections
