"""Load weights into a timm model from a file, and write a model's weights to a file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastirt.atomic import atomic_write
from fastirt.config.run_files import RunFiles
from fastirt.errors import UserError
from fastirt.model.weights.describe import describe_model, describe_tensors
from fastirt.model.weights.file_formats import file_kind, read_tensors
from fastirt.model.weights.jax import is_jax, load_jax
from fastirt.model.weights.match import Match, find_model, is_plain

log = logging.getLogger("fastirt")

HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pre_logits.")
UNUSED = (  # parts used only in pretraining; skipped unless the model has them
    *("decoder.", "decoder_", "mask_token", "lm_head.", "dino_head.", "ibot_head.", "predictor.", "projector."),
    *("projection_head.", "attn_pool."),
)
METADATA, LOADING = "fastirt", "load"


def locate(path: Path) -> Path:
    """The file of weights: `path`, or the final model of a run's folder. Raises UserError."""
    if path.is_dir():
        run = RunFiles(path)
        if run.final_model.is_file():
            return run.final_model
        unfinished = run.checkpoints.is_dir() or run.config.is_file()
        remedy = f"`fastirt train --resume {path}` finishes the run" if unfinished else "pass a run's folder or a file"
        raise UserError(f"--weights {path}: a folder without {run.final_model.name}: {remedy}")
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    return path


def load_weights(vit: nn.Module, path: Path) -> None:
    """Fill a timm model from a checkpoint, whatever wraps the weights.

    Official checkpoints are converted by timm. Averaged weights (EMA, teacher) are preferred.
    Classifier heads and parts of pretraining are skipped. Position embeddings and patch kernels of
    other sizes are resampled by timm. The log names each of these.

    Args:
        vit: the model, without a classifier.
        path: a file of any format that `read_tensors` reads, or a run's folder.

    Raises:
        UserError: the file is unreadable, holds another model or several, or has missing, surplus,
            misshapen or non-finite tensors; the message names them.
    """
    path = locate(path)
    tensors = read_tensors(path)
    if is_jax(tensors):
        load_jax(vit, path, tensors)
        return
    match = find_model(tensors, vit)
    expected = vit.state_dict()
    fitting = sum(name in match.state and match.state[name].shape == value.shape for name, value in expected.items())
    if 2 * fitting <= len(expected):
        raise UserError(
            f"--weights {path}: fits {fitting} of the {len(expected)} tensors of {describe_model(vit)}: "
            f"it looks like {describe_tensors(tensors)}; choose the --model that it fits"
        )
    if match.rivals:
        names = ", ".join([match.name, *match.rivals])
        raise UserError(f"--weights {path}: holds several models: {names}: save one of them to a separate file")
    state = _without_unused(match, expected, path)
    _check_state(state, expected, match, path)
    _log_choices(state, match, path)
    vit.load_state_dict(state)


def write_model(
    state: dict[str, Tensor], path: Path, description: dict[str, Any], loading: Optional[str] = None
) -> None:
    """Write the weights for timm as .safetensors, atomically. Raises UserError.

    state: by timm's names. description: JSON values for the metadata. loading: the line of Python
    that loads the file, for the metadata.
    """
    metadata = {"format": "pt", METADATA: json.dumps(description)}
    if loading:
        metadata[LOADING] = loading
    try:
        with atomic_write(path) as temporary:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary, metadata=metadata
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def read_model_metadata(path: Path) -> dict[str, Any]:
    """The `description` that `write_model` stored, by option; empty for other files.

    path: a file of any name and format, or a run's folder. Raises UserError if it is missing or
    unreadable.
    """
    path = locate(path)
    if file_kind(path) != "safetensors" and path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"--weights {path}: cannot be read: damaged, or no file of weights") from error
    if not isinstance(described, dict):
        return {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}


def _without_unused(match: Match, expected: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state without classifier and pretraining parts; logs the skipped ones."""
    heads = sorted(name for name in match.state if name.startswith(HEADS) and name not in expected)
    if heads:
        log.info("%s: classifier left out: %s", path, ", ".join(heads))
    unused = [name for name in match.state if name.startswith(UNUSED) and name not in expected]
    if unused:
        log.info("%s: parts of pretraining left out: %s", path, _listed(unused))
    return {name: value for name, value in match.state.items() if name not in {*heads, *unused}}


def _check_state(state: dict[str, Tensor], expected: dict[str, Tensor], match: Match, path: Path) -> None:
    _refuse(path, "is missing", [name for name in expected if name not in state])
    _refuse(path, "has surplus", [name for name in state if name not in expected])
    misshapen = [
        f"{name} {tuple(match.raw.get(name, state[name]).shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if state[name].shape != value.shape
    ]
    _refuse(path, "has misshapen", misshapen)
    unusable = [
        f"{name} ({_kind(value)})"
        for name, value in state.items()
        if not is_plain(value) or value.is_floating_point() != expected[name].is_floating_point()
    ]
    _refuse(path, "has no plain real numbers in", unusable, "save them as float32 tensors")
    _refuse(path, "has non-finite", [name for name, value in state.items() if not torch.isfinite(value).all()])


def _log_choices(state: dict[str, Tensor], match: Match, path: Path) -> None:
    if match.others:
        log.info("%s: took %s; the file also holds %s", path, match.name, ", ".join(match.others))
    elif match.averaged:
        log.info("%s: took %s", path, match.name)
    for name, value in state.items():
        source = match.raw.get(name)
        if source is None:
            continue
        is_patch_kernel = source.ndim == value.ndim and source.shape[2:] != value.shape[2:] and "embed" in name
        if is_patch_kernel or (name == "pos_embed" and source.shape != value.shape):
            log.info("%s: %s resampled from %s to %s", path, name, tuple(source.shape), tuple(value.shape))


def _kind(value: Tensor) -> str:
    """The unusual properties of a tensor, such as `quantized qint8` or `sparse float32`."""
    properties = ["quantized"] * value.is_quantized + ["sparse"] * (value.layout != torch.strided)
    return " ".join([*properties, str(value.dtype).removeprefix("torch."), *["without data"] * value.is_meta])


def _refuse(path: Path, problem: str, names: list[str], remedy: str = "is it for another --model?") -> None:
    if names:
        raise UserError(f"--weights {path}: {problem} {_listed(names)}: {remedy}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
