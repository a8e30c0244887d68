"""Process groups under torchrun: identity, collectives, and reporting lost ranks.

Without torchrun there is one rank, and every collective is a no-op. Three groups keep apart what must not wait for
each other: `data` (NCCL on GPUs, gloo on CPUs) for the step's tensors, `control` (gloo) for the host's decisions, `input` (gloo)
for the thread that makes batches.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any, Callable, NoReturn, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from fastirt.distributed.collectives import PendingGather
from fastirt.distributed.failures import EXIT_DELAY, PeerLost, ReportedByMainRank, _alive
from fastirt.distributed.rendezvous import rendezvous
from fastirt.errors import UserError, first_line

log = logging.getLogger("fastirt")

START_TIMEOUT = timedelta(minutes=10)
TIMEOUT = timedelta(minutes=30)  # for a rank that hangs; one that dies is noticed at once


class Ranks:
    """This process among all. `rank` of `world_size`; `local_rank` of `local_world_size` on this node; `bytes_moved`: bytes sent and received so far.

    `start` connects, `close` leaves in peace. Every method that talks must be called by all ranks in the same order.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.backend, self.bytes_moved = "", 0
        self._data: Any = None
        self._control: Any = None
        self._input: Any = None
        self._peers: list[dict[str, Any]] = []
        self._asked = 0
        self._stops: Optional[tuple[Tensor, Any]] = None

    @classmethod
    def from_environment(cls) -> "Ranks":
        """What torchrun says; the only rank without it. Raises UserError for half of it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "WORLD_SIZE" not in os.environ or "LOCAL_RANK" not in os.environ:
            return cls()  # also inside a batch job's own variables
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise UserError(f"the environment lacks what torchrun sets ({', '.join(names)}): {error}") from None

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def stop_check_interval(self) -> int:
        """Steps between two exchanges of `poll_stop_signal`: a ring of 64 ranks takes longer than a step."""
        return min(8, 1 + self.world_size // 8)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    def threads(self, most: int) -> int:
        """At most so many, and no more than this rank's share of the node's cores."""
        return max(1, min(most, len(os.sched_getaffinity(0)) // self.local_world_size))

    def batch_slice(self, whole: int) -> tuple[int, int]:
        """(first, count): this rank's part of the positions of a global batch."""
        count = whole // self.world_size
        return self.rank * count, count

    def start(self, device: torch.device) -> None:
        """Meet the others. Raises UserError where they do not come."""
        if not self.is_distributed or self._data is not None:
            return
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
            store = rendezvous(store, self.rank, self.world_size, START_TIMEOUT)
            self.backend = self._choose_backend(store, device)
            given = {"device_id": device} if self.backend == "nccl" else {}
            dist.init_process_group(
                self.backend, store=store, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT, **given
            )
            self._data = dist.group.WORLD
            self._control, self._input = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
            self._peers = self.gather_json({"host": socket.gethostname(), "pid": os.getpid()})
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"rank {self.rank} of {self.world_size} cannot reach the others: {first_line(error)}"
            ) from error
        if self.is_main:
            hosts = len({peer["host"] for peer in self._peers})
            log.info("%d ranks on %d node%s, %s", self.world_size, hosts, "s" if hosts > 1 else "", self.backend)

    def _choose_backend(self, store: dist.Store, device: torch.device) -> str:
        """The same on all ranks: NCCL where each has a GPU to itself. Raises UserError where some have none."""
        gpu = device_identity(device)
        store.set(f"gpu/{self.rank}", gpu)
        gpus = [gpu.decode() for gpu in store.multi_get([f"gpu/{rank}" for rank in range(self.world_size)])]
        without = [str(rank) for rank, other in enumerate(gpus) if not other]
        if not any(gpus):
            return "gloo"
        if without:
            raise self.shared_error(
                f"rank {', '.join(without)} runs on a CPU, others on GPUs: mend its node's driver, or pass --device cpu"
            )
        if len(set(gpus)) < self.world_size:
            if self.is_main:
                log.warning("%d ranks share %d GPUs: gloo instead of NCCL, slowly", self.world_size, len(set(gpus)))
            return "gloo"
        return "nccl"

    def close(self) -> None:
        """Leave once all are done."""
        if self._data is not None:
            self.barrier()
            dist.destroy_process_group()
            self._data = self._control = self._input = None

    @property
    def has_agent(self) -> bool:
        """Whether something started this process that also ends it, and may tell it to more than once."""
        return self.is_distributed or "TORCHELASTIC_RUN_ID" in os.environ

    def shared_error(self, message: str) -> UserError:
        """An error that every rank raises and only rank 0 prints."""
        return UserError(message) if self.is_main else ReportedByMainRank(message)

    # Tensors of the step, by the data group.

    def gather(self, own: Tensor) -> "PendingGather":
        """(n, …) of each rank to (world_size * n, …) in the order of ranks; without gradient. Begins; `PendingGather.wait` gives it."""
        self.bytes_moved += 2 * (self.world_size - 1) * own.nbytes
        whole = own.new_empty((self.world_size * own.shape[0], *own.shape[1:]))
        if own.is_cuda and self.backend == "gloo":
            host = torch.empty(whole.shape, dtype=whole.dtype)
            dist.all_gather_into_tensor(host, own.detach().cpu().contiguous(), group=self._data)
            return PendingGather(whole.copy_(host), None)
        work = dist.all_gather_into_tensor(whole, own.detach().contiguous(), group=self._data, async_op=True)
        return PendingGather(whole, work)

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """(world_size * n, …) of each rank, summed over the ranks: this rank's n rows."""
        first, count = self.batch_slice(whole.shape[0])
        self.bytes_moved += 2 * (self.world_size - 1) * (whole.nbytes // self.world_size)
        if self.backend == "gloo":
            parts = [torch.empty_like(whole[:count], device="cpu") for _ in range(self.world_size)]
            dist.all_to_all(parts, list(whole.cpu().contiguous().split(count)), group=self._data)
            return torch.stack(parts).sum(0).to(whole.device)
        out = torch.empty_like(whole[first : first + count])
        dist.reduce_scatter_tensor(out, whole.contiguous(), group=self._data)
        return out

    def sum_bucket(self, _, bucket):  # without annotations: DDP compares them, and cannot read strings
        """DDP's communication hook: gradients are summed over the ranks, not averaged."""
        buffer = bucket.buffer()
        self.bytes_moved += (
            4 * (self.world_size - 1) * buffer.nbytes // self.world_size
        )  # a ring: each way, sums and then results
        work = dist.all_reduce(buffer, group=self._data, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    # Decisions of the host, by the control group; never on the device.

    def gather_json(self, value: Any, thread: str = "control") -> list[Any]:
        """A JSON value of each rank, in the order of ranks, on all. thread: "input" from the one that makes batches."""
        if not self.is_distributed:
            return [value]
        group = self._input if thread == "input" else self._control
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        room = 512  # most messages are a few bytes: one round
        lengths, texts = self._gather_bytes(data, room, group)
        if max(lengths) > room:
            lengths, texts = self._gather_bytes(data, max(lengths), group)
        return [json.loads(text[:length].numpy().tobytes()) for length, text in zip(lengths, texts)]

    def _gather_bytes(self, data: Tensor, room: int, group: Any) -> tuple[list[int], list[Tensor]]:
        own = torch.zeros(8 + room, dtype=torch.uint8)
        own[:8] = torch.tensor([len(data)]).view(torch.uint8)
        own[8 : 8 + min(room, len(data))] = data[:room]
        whole = torch.empty(self.world_size, 8 + room, dtype=torch.uint8)
        dist.all_gather_into_tensor(whole, own[None], group=group)
        return whole[:, :8].contiguous().view(torch.int64).flatten().tolist(), list(whole[:, 8:])

    def gather_rows(self, own: Tensor) -> Optional[Tensor]:
        """(n_r, …) on the CPU, of any length on each rank, one after the other on rank 0; None elsewhere."""
        if not self.is_distributed:
            return own
        counts = self.gather_json(len(own))
        padded = torch.zeros(max(counts), *own.shape[1:], dtype=own.dtype)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts] if self.is_main else None
        dist.gather(padded, parts, group=self._control, dst=0)
        return torch.cat([part[:count] for part, count in zip(parts, counts)]) if parts else None

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """The JSON value of `work()` of rank 0, on all; it runs there alone. Its UserError is ReportedByMainRank on the others."""
        if not self.is_distributed:
            return work()
        told: dict[str, Any] = {}
        error: Optional[UserError] = None
        if self.is_main:
            try:
                told = {"value": work()}
            except UserError as found:
                error = found
        told = self.gather_json(told)[0]
        if error is not None:
            raise error
        if not told:
            raise ReportedByMainRank
        return told["value"]

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier(group=self._control)

    def poll_stop_signal(self, signal: int) -> int:
        """Largest stop signal of any rank as of the previous exchange (with one rank: now). Called once a step.

        Exchanges are asynchronous and read one interval later, so the host never blocks and all ranks stop at the same step.
        Large jobs exchange every `stop_check_interval` steps.
        """
        if not self.is_distributed:
            return signal
        self._asked += 1
        if self._asked % self.stop_check_interval:
            return 0
        agreed = 0
        if self._stops is not None:
            flag, work = self._stops
            work.wait()
            agreed = int(flag)
        flag = torch.tensor(signal)
        self._stops = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control, async_op=True))
        return agreed

    # When a rank is lost.

    def as_peer_lost(self, error: BaseException) -> Optional[PeerLost]:
        """The lost rank behind an exception of a collective, named; None for any other exception."""
        text = str(error)
        if not self.is_distributed or isinstance(error, UserError):
            return None
        if not isinstance(error, dist.DistError) and not any(w in text for w in ("gloo", "NCCL", "Connection closed")):
            return None
        gone = self._gone()
        if gone:
            who = ", ".join(f"rank {rank} (pid {self._peers[rank]['pid']})" for rank in gone)
            return PeerLost(f"{who} exited unexpectedly; rank {self.rank} stops without saving: continue with --resume")
        elsewhere = sorted({peer["host"] for peer in self._peers} - {socket.gethostname()})
        where = f", perhaps on {' or '.join(elsewhere)}" if elsewhere else ""
        return PeerLost(
            f"another rank exited unexpectedly{where}; rank {self.rank} stops without saving: "
            f"continue with --resume ({first_line(error)})"
        )

    def _gone(self) -> list[int]:
        """Ranks of this node whose process has ended; given a moment, since connections close before processes are seen to end."""
        host = socket.gethostname()
        for _ in range(10):
            gone = [r for r, peer in enumerate(self._peers) if peer["host"] == host and not _alive(peer["pid"])]
            if gone:
                return gone
            time.sleep(0.1)
        return []

    def exit_now(self, code: int, linger: bool) -> NoReturn:
        """End this process at once, without taking down what other ranks may have broken. linger: let torchrun see first who died."""
        logging.shutdown()
        if linger:
            time.sleep(EXIT_DELAY)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def device_identity(device: torch.device) -> str:
    """What no other GPU has; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


SINGLE_PROCESS = Ranks()  # a process that is the only rank; holds nothing
