"""What the hosts of the ranks decide together, over gloo and without the device."""

from __future__ import annotations

import json
from typing import Any, Callable, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastirt.distributed.failures import ReportedByMainRank
from fastirt.errors import UserError

ROOM = 512  # bytes of a first message: most fit, so that one exchange is enough


class HostChannel:
    """One gloo group.

    All ranks call the same methods in the same order; with one rank nothing is sent.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: Any = None) -> None:
        self.rank, self.world_size, self._group = rank, world_size, group
        self._polls = 0
        self._pending: Optional[tuple[Tensor, Any]] = None

    def gather_json(self, value: Any) -> list[Any]:
        """A JSON value of each rank, in the order of ranks, on all ranks."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths, texts = self._gather_bytes(data, ROOM)
        if max(lengths) > ROOM:
            lengths, texts = self._gather_bytes(data, max(lengths))
        return [json.loads(text[:length].numpy().tobytes()) for length, text in zip(lengths, texts)]

    def _gather_bytes(self, data: Tensor, room: int) -> tuple[list[int], list[Tensor]]:
        own = torch.zeros(8 + room, dtype=torch.uint8)
        own[:8] = torch.tensor([len(data)]).view(torch.uint8)
        own[8 : 8 + min(room, len(data))] = data[:room]
        whole = torch.empty(self.world_size, 8 + room, dtype=torch.uint8)
        dist.all_gather_into_tensor(whole, own[None], group=self._group)
        return whole[:, :8].contiguous().view(torch.int64).flatten().tolist(), list(whole[:, 8:])

    def gather_rows(self, own: Tensor) -> Optional[Tensor]:
        """(n_r, …) on the CPU, of any length, concatenated on rank 0; None on the other ranks."""
        if self.world_size == 1:
            return own
        counts = self.gather_json(len(own))
        padded = torch.zeros(max(counts), *own.shape[1:], dtype=own.dtype)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts] if self.rank == 0 else None
        dist.gather(padded, parts, group=self._group, dst=0)
        return torch.cat([part[:count] for part, count in zip(parts, counts)]) if parts else None

    def broadcast(self, tensor: Optional[Tensor]) -> Tensor:
        """Rank 0's tensor, on the CPU of all ranks; the others pass None."""
        if self.world_size == 1:
            return tensor
        is_main = self.rank == 0
        shape, dtype = self.gather_json([list(tensor.shape), str(tensor.dtype)] if is_main else None)[0]
        # contiguous, because gloo sends the memory as it lies there
        whole = tensor.contiguous() if is_main else torch.empty(shape, dtype=getattr(torch, dtype.split(".")[1]))
        dist.broadcast(whole, src=0, group=self._group)
        return whole

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone and return its JSON value on all ranks.

        Its UserError is raised on rank 0, and ReportedByMainRank on the others.
        """
        if self.world_size == 1:
            return work()
        answer: dict[str, Any] = {}
        error: Optional[UserError] = None
        if self.rank == 0:
            try:
                answer = {"value": work()}
            except UserError as raised:
                error = raised
        answer = self.gather_json(answer)[0]
        if error is not None:
            raise error
        if not answer:
            raise ReportedByMainRank
        return answer["value"]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._group)

    @property
    def poll_interval(self) -> int:
        """Steps between two exchanges: with 64 ranks an exchange takes longer than a step."""
        return min(8, 1 + self.world_size // 8)

    def poll(self, values: Sequence[int]) -> Optional[list[int]]:
        """The largest of each value over all ranks as of the previous exchange (with one rank:
        now); None at a step without an exchange.

        Called once a step.

        Exchanges are asynchronous and read one interval later, so the host never blocks and all
        ranks act at the same step. Large jobs exchange every `poll_interval` steps.
        """
        if self.world_size == 1:
            return list(values)
        self._polls += 1
        if self._polls % self.poll_interval:
            return None
        agreed = None
        if self._pending is not None:
            largest, work = self._pending
            work.wait()
            agreed = largest.tolist()
        largest = torch.tensor(values)
        self._pending = (largest, dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return agreed
