"""A timm vision transformer as an encoder: image to unit vector."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fastirt.config.options import Config, ModelConfig
from fastirt.model.drop_path import replace_drop_paths

GEM_POWER = 3.0  # Radenovic et al. 2018
GEM_EPS = 1e-6


class Encoder(nn.Module):
    """Images to embeddings: (B, 3, S, S) float, normalized, to (B, D) float32 of length 1.

    Args:
        vit: the timm model without a classifier; its DropPath modules are replaced.
        config: pooling and evaluation descriptor.
        input_size: S in pixels.

    Attributes:
        embed_dim: D.
        mean: per channel, of the images in [0, 1] that the weights were trained on.
        std: likewise.
        table: the drop-path masks.
        distilled: whether the model has a distillation token.
    """

    def __init__(self, vit: nn.Module, config: ModelConfig, input_size: int) -> None:
        super().__init__()
        self.vit, self.config, self.input_size = vit, config, input_size
        self.embed_dim: int = vit.num_features
        self.mean, self.std = tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
        self.table = replace_drop_paths(vit)
        self.distilled = getattr(vit, "dist_token", None) is not None

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) images; the descriptor is pooled as `config.pooling` says."""
        tokens = self.vit.forward_features(images)  # (B, prefix + patches, D)
        descriptor = self._pool(tokens)
        fc_norm = getattr(self.vit, "fc_norm", None)  # of models that pool before their last norm
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
        stream: str = "encoder",
        first: int = 0,
        count: Optional[int] = None,
    ) -> None:
        """Set the drop-path masks of a step; does nothing without drop path.

        Args:
            seed: of the run.
            step: of the run.
            batch_size: of the global batch, for which masks are drawn.
            stream: a key of `random_streams.DROP_PATH`.
            first: first sample of the global batch that this model sees.
            count: number of samples that it sees; None: all from `first` on.
        """
        device = next(self.vit.parameters()).device
        self.table.draw(seed, step, batch_size, stream, device, first, count)


def normalization_constants(config: Config, encoder: Encoder) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) per channel for images in [0, 1]: the model's, or ImageNet's."""
    if config.input.normalization == "imagenet":
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return encoder.mean, encoder.std
