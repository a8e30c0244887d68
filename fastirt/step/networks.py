"""The encoder, its momentum encoder, and the models that forward and backward run on."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.config.options import Config
from fastirt.model.bf16_copy import Bf16Copy
from fastirt.model.encoder import Encoder
from fastirt.model.momentum_encoder import make_momentum_encoder, momentum_update
from fastirt.model.onednn_linear import use_onednn
from fastirt.model.precision import autocast, resolve_precision


class Networks:
    """`encoder` is trained by the optimizer; `momentum_encoder` follows it, or is None.

    Both hold fp32 weights. Forward and backward run on `compute_encoder` and
    `compute_momentum_encoder`: the same models, or bf16 copies of them with
    `--precision bf16-weights`. `weights`: the trained parameters.
    """

    def __init__(self, encoder: Encoder, config: Config, device: torch.device) -> None:
        self.momentum = config.memory.encoder_momentum
        self.encoder = encoder.to(device, memory_format=torch.channels_last).train()
        self.momentum_encoder = None if self.momentum is None else make_momentum_encoder(self.encoder)
        self.dtype, self.device = resolve_precision(config.model.precision, device), device
        self.weights = [p for p in self.encoder.parameters() if p.requires_grad]
        self.compute_encoder, self.compute_momentum_encoder = self.encoder, self.momentum_encoder
        self.bf16_copies: list[Bf16Copy] = []
        if config.model.precision == "bf16-weights":
            masters = [model for model in (self.encoder, self.momentum_encoder) if model is not None]
            self.bf16_copies = [Bf16Copy(model) for model in masters]
            self.compute_encoder = self.bf16_copies[0].encoder
            if self.momentum_encoder is not None:
                self.compute_momentum_encoder = self.bf16_copies[1].encoder

    def use_onednn(self) -> None:
        """Train by oneDNN's fp32 linear layers; torch has it for bf16 anyway."""
        if self.dtype == torch.float32:
            for encoder in (self.encoder, self.momentum_encoder):
                if encoder is not None:
                    use_onednn(encoder)

    def draw_masks(self, seed: int, step: int, batch_size: int, part: tuple[int, int], keys: bool) -> None:
        """Set the drop-path masks for rows `part` = (first, count) of a global batch of
        `batch_size`.

        keys: whether the momentum encoder runs in this step, too.
        """
        self.compute_encoder.draw_masks(seed, step, batch_size, "encoder", *part)
        if self.compute_momentum_encoder is not None and keys:
            self.compute_momentum_encoder.draw_masks(seed, step, batch_size, "momentum_encoder", *part)

    def begin_step(self) -> None:
        """Drop the gradients and refresh the bf16 copies."""
        for weight in self.weights:
            weight.grad = None
        for copy in self.bf16_copies:
            copy.copy_weights()

    def embed(self, encoder: Encoder, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, D) float32 unit vectors, in the precision of the run."""
        if self.bf16_copies:
            return encoder(images)
        with autocast(self.dtype, self.device):
            return encoder(images)

    def collect_gradients(self) -> None:
        """Copy the gradients of the bf16 copy to the encoder's fp32 weights."""
        if self.bf16_copies:
            self.bf16_copies[0].copy_gradients()

    def update_momentum(self, skip: Optional[Tensor] = None) -> None:
        """Move the momentum encoder towards the encoder unless the 0-d bool `skip` is true."""
        if self.momentum_encoder is not None:
            momentum_update(self.momentum_encoder, self.encoder, self.momentum, skip)
