"""One optimiser step, in plain eager PyTorch: the reference for every faster engine."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor, nn

from fastirt.config import Config
from fastirt.encoder import Encoder, make_twin, momentum_update
from fastirt.errors import UserError
from fastirt.input.loader import Batch
from fastirt.input.normalise import normalise
from fastirt.kernels.checks import choose
from fastirt.memory import Memory
from fastirt.objective import RetrievalLoss
from fastirt.optim import build_optimizer, held_step, learning_rate

LOSS_NAMES = ("loss", "contrastive_batch", "contrastive_memory", "koleo", "grad_norm")


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the encoder's matrix products. `auto` is bf16 on a GPU and fp32 on a CPU."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast over fp32 weights (no loss scaling), or nothing."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()


class TrainStep(nn.Module):
    """Encoder, twin, memory, objective and optimiser; calling it does one step and never waits for the device.

    The first non-finite loss or gradient sets `first_bad_step` (0-d int64 on the device, -1 = none), which from then on holds
    back every update of weights, twin and memory. `sums` (5,) float64 adds up the values named in LOSS_NAMES over `counted` steps.
    """

    def __init__(
        self, encoder: Encoder, config: Config, train_size: int, mean: tuple, std: tuple, device: torch.device
    ) -> None:
        super().__init__()
        self.config, self.device, self.mean, self.std = config, device, mean, std
        self.encoder = encoder.to(device, memory_format=torch.channels_last).train()
        self.twin = make_twin(self.encoder) if config.memory.encoder_momentum is not None else None
        size = memory_size(config, train_size)
        dtype = torch.bfloat16 if config.memory.memory_dtype == "bf16" else torch.float32
        self.memory = Memory(size, encoder.embed_dim, dtype, device) if size else None
        self.dtype = resolve_precision(config.model.precision, device)
        objective, precision = config.objective, config.objective.loss_precision
        if precision == "auto":
            precision = "tf32" if self.dtype == torch.bfloat16 else "fp32"
        try:
            choose(objective.loss_impl, torch.empty(0, encoder.embed_dim, device=device))
        except ValueError as error:
            raise UserError(f"--loss-impl: {error}") from None
        self.objective = RetrievalLoss(
            objective.margin, objective.contrastive, objective.lambda_reg, objective.loss_impl, precision
        )
        self.optimizer = build_optimizer(self.encoder.vit, config.optim)
        self.parameters_list = [p for p in self.encoder.parameters() if p.requires_grad]
        self.register_buffer("first_bad_step", torch.full((), -1, dtype=torch.int64, device=device))
        self.register_buffer("sums", torch.zeros(len(LOSS_NAMES), dtype=torch.float64, device=device))
        self.counted = 0

    def forward(self, batch: Batch) -> None:
        """One step on a batch of uint8 pictures (B, S, S, 3) with labels (B,), both on the device."""
        config, step = self.config, batch.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim) * group.get("lr_scale", 1.0)
        images = normalise(batch.images, self.mean, self.std, self.dtype)
        torch.manual_seed(
            int(np.random.SeedSequence([config.run.seed, step]).generate_state(1)[0])
        )  # for dropout of any kind
        self.encoder.draw_masks(config.run.seed, step, len(images), stream="student")
        with autocast(self.dtype, self.device):
            embeddings = self.encoder(images)

        written, against = None, ()
        if self.memory is not None and step >= config.memory.memory_start:
            written = self.memory.write(self._keys(images, step, embeddings), batch.labels)
            own_slots = (
                written.slots if self.twin is None else None
            )  # the twin's view of a picture is a positive like any other
            against = (self.memory.embeddings, self.memory.labels, own_slots)
        losses = self.objective(embeddings, batch.labels, *against)

        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        gradients = [p.grad for p in self.parameters_list if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if config.optim.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters_list, config.optim.clip_grad, norm, foreach=True)

        with torch.no_grad():
            bad = ~(torch.isfinite(losses.total) & torch.isfinite(norm))
            self.first_bad_step.copy_(torch.where(bad & (self.first_bad_step < 0), step, self.first_bad_step))
            hold = self.first_bad_step >= 0
            held_step(self.optimizer, hold)
            if self.twin is not None:
                momentum_update(self.twin, self.encoder, config.memory.encoder_momentum, hold)
            if written is not None:
                self.memory.undo(written, hold)
            self.sums += torch.stack([*losses, norm]).double()
            self.counted += 1

    def _keys(self, images: Tensor, step: int, embeddings: Tensor) -> Tensor:
        """What goes into the memory: the twin's embeddings where there is one, else the encoder's own, without gradient."""
        if self.twin is None:
            return embeddings.detach()
        self.twin.draw_masks(self.config.run.seed, step, len(images), stream="twin")
        with torch.no_grad(), autocast(self.dtype, self.device):
            return self.twin(images)


def memory_size(config: Config, train_size: int) -> int:
    """Slots of the memory: the stated share of the training set, rounded down."""
    return int(train_size * config.memory.memory_ratio)
