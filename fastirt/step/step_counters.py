"""What a step counts on the device: its losses, and the first non-finite step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastirt.objective.retrieval_loss import Losses

LOSS_NAMES = ("loss", "contrastive_batch", "contrastive_memory", "koleo", "grad_norm")


class StepCounters:
    """`first_bad_step`: 0-d int64, the first step with a non-finite loss or gradient, or -1.

    `sums` (5,) float64 adds up the values named in LOSS_NAMES over `steps_summed` steps.
    All tensors stay on the device; nothing here waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(LOSS_NAMES), dtype=torch.float64, device=device)
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)
        self.steps_summed = 0

    def flag(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Record a non-finite loss or norm; 0-d bool: whether this step must not update."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.first_bad_step.copy_(torch.where(bad & (self.first_bad_step < 0), self.step_number, self.first_bad_step))
        return self.first_bad_step >= 0

    def add(self, losses: Losses, norm: Tensor) -> None:
        self.sums += torch.stack([*losses, norm]).double()

    def start_sums(self) -> None:
        """Restart the sums at the next step."""
        self.sums.zero_()
        self.steps_summed = 0
