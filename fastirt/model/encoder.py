"""A timm vision transformer as an encoder: picture to unit vector; and its momentum twin."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastirt.config.options import Config, ModelConfig
from fastirt.errors import UserError
from fastirt.model.build import check_model, create_model
from fastirt.model.drop_path import replace_drop_paths
from fastirt.model.weights.load import load_weights, write_model
from fastirt.model.weights.timm_line import loading_line

GEM_POWER = 3.0  # Radenovic et al. 2018
GEM_EPS = 1e-6


class Encoder(nn.Module):
    """`forward`: (B, 3, S, S) float pictures to (B, D) float32 embeddings of length 1.

    `vit` is the timm model without a classifier; `mean` and `std` are what it was trained with; `embed_dim` is D.
    """

    def __init__(self, vit: nn.Module, config: ModelConfig, input_size: int) -> None:
        super().__init__()
        self.vit, self.config, self.input_size = vit, config, input_size
        self.embed_dim: int = vit.num_features
        self.mean, self.std = tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
        self.table = replace_drop_paths(vit)
        self.distilled = getattr(vit, "dist_token", None) is not None

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(images)  # (B, prefix + patches, D)
        descriptor = self._pool(tokens)
        fc_norm = getattr(self.vit, "fc_norm", None)  # models that pool before their last norm
        descriptor = descriptor if fc_norm is None else fc_norm(descriptor)
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(descriptor.float(), dim=1)

    def _pool(self, tokens: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            if self.distilled and self.config.eval_descriptor == "cls+dist" and not self.training:
                return (tokens[:, 0] + tokens[:, 1]) / 2
            return tokens[:, 0]
        patches = tokens[:, self.vit.num_prefix_tokens :]
        if self.config.pooling == "mean":
            return patches.mean(dim=1)
        if self.config.pooling == "max":
            return patches.amax(dim=1)
        return patches.float().clamp(min=GEM_EPS).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)

    def draw_masks(
        self,
        seed: int,
        step: int,
        batch_size: int,
        stream: str = "student",
        first: int = 0,
        count: Optional[int] = None,
    ) -> None:
        """Set the drop-path masks of this step, a function of (seed, step, position in the global batch of `batch_size`).

        first, count: the slice of the global batch that this model sees. stream: `student` or `twin`. Costs nothing without drop path.
        """
        device = next(self.vit.parameters()).device
        self.table.draw(seed, step, batch_size, stream, device, first, count)


def build_encoder(config: ModelConfig, input_size: int) -> Encoder:
    """The encoder with its weights. Raises UserError for an unknown or unsuitable model, a size that is no multiple of the
    patch, or weights that cannot be had; weights are never random unless `scratch` was asked for."""
    vit = create_model(config, input_size)
    check_model(vit, config, input_size)
    if config.weights is None or _is_tag(config.weights):
        if config.weights is not None and config.weights.split(".")[0] != config.model.split(".")[0]:
            raise UserError(f"--weights {config.weights}: are of another model than --model {config.model}")
        vit = create_model(config, input_size, pretrained=True, name=config.weights)
    elif config.weights != "scratch":
        load_weights(vit, Path(config.weights))
    return Encoder(vit, config, input_size)


def make_twin(encoder: Encoder) -> Encoder:
    """A copy that is moved by `momentum_update` alone. It stays in training mode, drop path included, as the public code's does."""
    twin = copy.deepcopy(encoder).requires_grad_(False)
    return twin.train()


@torch.no_grad()
def momentum_update(twin: Encoder, encoder: Encoder, momentum: float, hold: Optional[Tensor] = None) -> None:
    """twin <- momentum * twin + (1 - momentum) * encoder; not where the 0-d bool tensor `hold` is true. No synchronisation."""
    theirs, ours = list(twin.parameters()), list(encoder.parameters())
    if hold is None:
        torch._foreach_lerp_(theirs, ours, 1 - momentum)
    else:
        moved = torch._foreach_sub(ours, theirs)
        torch._foreach_mul_(moved, (1 - momentum) * (~hold).float())
        torch._foreach_add_(theirs, moved)
    for mine, other in zip(twin.buffers(), encoder.buffers()):
        mine.copy_(other)


def save_model(encoder: Encoder, path: Path, config: Config) -> None:
    """The timm model's weights as .safetensors, which the line of `loading_line` loads in plain timm.

    The file's metadata holds that line, and says how pictures get to the model, so that an evaluation of the file alone
    feeds it as the run did.
    """
    own = dataclasses.replace(config, model=encoder.config).replace(input_size=encoder.input_size)
    write_model(encoder.vit.state_dict(), path, description(own), loading_line(encoder, path))


def description(config: Config) -> dict[str, Any]:
    """What an evaluation of the weights alone needs to know of the run, by option."""
    return {
        "method": config.method,
        "recipe": config.recipe,
        "model": config.model.model,
        "model_kwargs": config.model.model_kwargs,
        "pooling": config.model.pooling,
        "eval_descriptor": config.model.eval_descriptor,
        "input_size": config.input.input_size,
        "resize": config.input.resize,
        "resize_size": config.input.resize_size,
        "orientation": config.input.orientation,
        "normalization": config.input.normalization,
    }


def _is_tag(weights: str) -> bool:
    """Whether this is a timm name, such as deit_tiny_patch16_224.fb_in1k, and no file."""
    return not Path(weights).exists() and timm.is_model(weights)
