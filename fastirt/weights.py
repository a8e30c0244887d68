"""Files of weights into a timm model, without running anything that a file contains."""

from __future__ import annotations

import json
import logging
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fastirt.errors import UserError
from fastirt.files import replacing

log = logging.getLogger("fastirt")

HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pre_logits.")
WRAPPERS = ("model", "state_dict")
METADATA = "fastirt"


def load_weights(vit: nn.Module, path: Path) -> None:
    """Fill `vit` from a .safetensors or .pth file (bare, or wrapped in `model` or `state_dict`; `module.` prefixes go).

    Classifier heads are left out; position embeddings of another grid are interpolated (bicubic, antialiased, as timm does).
    Raises UserError for an unreadable file and for any other missing, surplus, misshapen or non-finite tensor, by name.
    """
    state = read_state(path)
    expected = vit.state_dict()
    heads = sorted(name for name in state if name.startswith(HEADS) and name not in expected)
    if heads:
        log.info("%s: classifier left out: %s", path, ", ".join(heads))
    state = {name: value for name, value in state.items() if name not in heads}
    if "pos_embed" in state and "pos_embed" in expected and state["pos_embed"].shape != expected["pos_embed"].shape:
        state["pos_embed"] = _resample(state["pos_embed"], vit, path)
    _refuse(path, "is missing", [name for name in expected if name not in state])
    _refuse(path, "has surplus", [name for name in state if name not in expected])
    _refuse(
        path,
        "has misshapen",
        [
            f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if state[name].shape != value.shape
        ],
    )
    _refuse(path, "has non-finite", [name for name, value in state.items() if not torch.isfinite(value).all()])
    vit.load_state_dict(state)


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensor by name. Raises UserError where the file holds anything else."""
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        reason = (
            "holds objects other than tensors"
            if isinstance(error, pickle.UnpicklingError)
            else "damaged, or no file of weights"
        )
        raise UserError(
            f"--weights {path}: cannot be read: {reason}; use a .safetensors or .pth file of tensors"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise UserError(
            f"--weights {path}: holds no tensors by name (neither bare nor under {' or '.join(map(repr, WRAPPERS))})"
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def write_model(state: dict[str, Tensor], path: Path, description: dict[str, Any]) -> None:
    """The weights as plain timm loads them, with `description` (JSON values) in the file's metadata; atomic."""
    try:
        with replacing(path) as temporary:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in state.items()},
                temporary,
                metadata={"format": "pt", METADATA: json.dumps(description)},
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def read_model_metadata(path: Path) -> dict[str, Any]:
    """What `write_model` was told of a model, by flag name; empty for a file of other origin. Raises UserError if unreadable."""
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"--weights {path}: cannot be read: damaged, or no file of weights") from error
    return {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}


def _resample(embedding: Tensor, vit: nn.Module, path: Path) -> Tensor:
    """Position embeddings (1, T, D) for another grid."""
    prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
    side = math.isqrt(max(0, embedding.shape[1] - prefix)) if embedding.ndim == 3 else 0
    if (
        embedding.ndim != 3
        or side * side != embedding.shape[1] - prefix
        or embedding.shape[2] != vit.pos_embed.shape[2]
    ):
        raise UserError(
            f"--weights {path}: pos_embed {tuple(embedding.shape)} does not fit {tuple(vit.pos_embed.shape)}: is it another --model?"
        )
    return resample_abs_pos_embed(
        embedding.float(), new_size=list(vit.patch_embed.grid_size), old_size=[side, side], num_prefix_tokens=prefix
    )


def _refuse(path: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"--weights {path}: {what} {', '.join(names[:3])}{more}: is it for another --model?")
