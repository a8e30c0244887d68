"""Asynchronous device-to-host copies of step metrics."""

from __future__ import annotations

from typing import Any, Optional

import torch

from fastirt.step.train_step import LOSS_NAMES, TrainStep


class AsyncMetrics:
    """Copies a step's flag and sums into page-locked memory and looks at them when they have arrived."""

    def __init__(self, module: TrainStep, device: torch.device) -> None:
        self.module, self.on_gpu = module, device.type == "cuda"
        self._flag = torch.full((), -1, dtype=torch.int64, pin_memory=self.on_gpu)
        self._sums = torch.zeros(len(LOSS_NAMES), dtype=torch.float64, pin_memory=self.on_gpu)
        self._asked: Optional[tuple[dict[str, Any], int, Any]] = None

    def first_bad_step(self, wait: bool = False) -> int:
        """The first non-finite step, or -1. Without `wait`: as far as the device had got when this was last called."""
        if wait:
            return int(self.module.first_bad_step)
        earlier = int(self._flag)
        self._flag.copy_(self.module.first_bad_step, non_blocking=True)
        return earlier if self.on_gpu else int(self._flag)

    def request(self, row: dict[str, Any]) -> None:
        """Start to fetch the mean of each loss since the last call; `row` comes back with the answer. At most one is under way."""
        self._sums.copy_(self.module.sums, non_blocking=True)
        arrived = None
        if self.on_gpu:
            arrived = torch.cuda.Event()
            arrived.record()
        self._asked = (row, self.module.steps_summed, arrived)
        self.module.sums.zero_()
        self.module.steps_summed = 0

    def poll(self, wait: bool = False) -> Optional[dict[str, Any]]:
        """The row asked for with its means, once; None where there is none, or not yet."""
        if self._asked is None:
            return None
        row, count, arrived = self._asked
        if arrived is not None and not arrived.query():
            if not wait:
                return None
            arrived.synchronize()
        self._asked = None
        return {**row, **dict(zip(LOSS_NAMES, (self._sums / max(1, count)).tolist()))}
