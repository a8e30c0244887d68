"""Variants of the model, measured before adoption; each computes the same as the original."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastirt.model.encoder import Encoder


class PatchProjection(nn.Conv2d):
    """A convolution with stride = kernel size, as one matrix product over patches."""

    def forward(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        side = self.kernel_size[0]
        rows, columns = height // side, width // side
        patches = images.permute(0, 2, 3, 1).reshape(count, rows, side, columns, side, channels)
        patches = patches.transpose(2, 3).reshape(count, rows * columns, side * side * channels)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        tokens = F.linear(patches, weight, self.bias)
        return tokens.transpose(1, 2).reshape(count, self.out_channels, rows, columns)


def patch_matmul(encoder: Encoder) -> None:
    """Turn the patch embedding into a PatchProjection; the weights stay."""
    encoder.vit.get_submodule("patch_embed.proj").__class__ = PatchProjection


def padded_attention(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """softmax(QK^T / sqrt(d)) V for (B, H, T, d), padded to `length` >= T tokens with a mask."""
    tokens = query.shape[2]
    query, key, value = (F.pad(x, (0, 0, 0, length - tokens)) for x in (query, key, value))
    mask = (torch.arange(length, device=query.device) < tokens).expand(length, length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[:, :, :tokens]


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, H, T, d) by an implementation of ATTENTION_IMPLS; any "padded to N" works too."""
    if name.startswith("padded to "):
        return padded_attention(query, key, value, int(name.removeprefix("padded to ")))
    if name in BACKENDS:
        with sdpa_kernel(BACKENDS[name]):
            return F.scaled_dot_product_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


ATTENTION_IMPLS = ("torch's choice", *BACKENDS, "padded to 200", "padded to 256")
