"""Google's .npz checkpoints (ViT, AugReg, SigLIP), read by timm's loader."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastirt.errors import UserError, first_line
from fastirt.model.weights.describe import describe_model

PATCHES = "embedding/kernel"
BLOCK = re.compile(r"encoderblock_(\d+)/")
STACKED = "encoderblock/LayerNorm_0/scale"  # big_vision keeps all blocks in one array


def is_jax(tensors: dict[str, Tensor]) -> bool:
    return any(name.endswith(PATCHES) for name in tensors)


def load_jax(vit: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `vit` from a file of numpy arrays; unpickles nothing. Raises UserError if it misfits."""
    depth = _depth(tensors)
    width = next(value for name, value in tensors.items() if name.endswith(PATCHES)).shape[-1]
    if not hasattr(vit, "load_pretrained"):
        problem = "timm cannot load such a file into it"
    # timm would silently ignore blocks.
    elif (width, depth) != (vit.num_features, len(vit.blocks)):
        problem = f"it has embed_dim {width}, depth {depth}"
    else:
        problem = _fill(vit, path)
    if problem:
        raise UserError(f"--weights {path}: a JAX checkpoint that does not fit {describe_model(vit)}: {problem}")


def _fill(vit: nn.Module, path: Path) -> str | None:
    """Load and return the problem, if any. Parameters are NaN before, to find missing ones."""
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(float("nan"))
        try:
            vit.load_pretrained(str(path))
        except Exception as error:  # numpy, einops and torch raise unrelated types for wrong shapes
            return first_line(error)
    missing = [name for name, value in vit.named_parameters() if not torch.isfinite(value).all()]
    return f"missing or non-finite: {', '.join(missing[:3])}" if missing else None


def _depth(tensors: dict[str, Tensor]) -> int:
    """Number of blocks of the image tower."""
    names = [name for name in tensors if "txt/" not in name]
    stacked = [tensors[name].shape[0] for name in names if name.endswith(STACKED) and tensors[name].ndim == 2]
    numbers = [int(match[1]) + 1 for match in map(BLOCK.search, names) if match]
    return max(stacked + numbers, default=0)
