"""Checkpoints: one safetensors file each, written whole or not at all, read without unpickling anything.

Tensors lie flat under their path in the state (`encoder.vit.cls_token`, `optimizer.state.0.exp_avg`); everything else is
JSON in the file's metadata, with `{"tensor": path}` where a tensor stood, and likewise for dicts, lists, tuples and dtypes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastirt.errors import UserError
from fastirt.files import replacing

FORMAT = "fastirt checkpoint 1"


def save(path: Path, state: dict[str, Any], keep: Optional[int] = None) -> None:
    """Write `state`, a tree of dicts, lists, tensors and JSON values, to `path` by way of a temporary file and a rename.

    keep: how many of the newest `step_*.safetensors` beside it to leave. Raises UserError where the disk refuses.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".*.tmp"):  # of a save that was killed
            stale.unlink(missing_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "state": json.dumps(tree)})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); earlier checkpoints are untouched: free space or choose another "
            "--output-dir, then --resume"
        ) from error
    if keep is not None:
        earlier = [old for old in sorted(path.parent.glob("step_*.safetensors")) if old.name < path.name]
        for old in earlier[: len(earlier) - max(1, keep) + 1]:
            old.unlink(missing_ok=True)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `save` wrote. Raises UserError for a missing, damaged or foreign file."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path}: not a checkpoint of this version (format {metadata.get('format')!r}, expected {FORMAT!r})"
                )
            return _unflatten(json.loads(metadata["state"]), file.get_tensor)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: damaged checkpoint ({str(error).splitlines()[0]}); resume from an older one"
        ) from error


def forget_later(path: Path) -> None:
    """Remove the checkpoints past `path` in its folder: they belong to a future that will be lived again."""
    for later in path.parent.glob("step_*.safetensors"):
        if later.name > path.name:
            later.unlink(missing_ok=True)


def find(where: Path) -> Optional[Path]:
    """The newest checkpoint of a run folder, or the file itself; None where the folder holds none."""
    if where.is_file():
        return where
    files = sorted((where / "checkpoints").glob("step_*.safetensors"))
    return files[-1] if files else None


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _flatten(item, f"{path}.{key}" if path else str(key), tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"a checkpoint cannot hold {path}, a {type(value).__name__}: choose another --opt")


def _unflatten(value: Any, tensor: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensor(value["tensor"])
    if "list" in value:
        return [_unflatten(item, tensor) for item in value["list"]]
    if "tuple" in value:
        return tuple(_unflatten(item, tensor) for item in value["tuple"])
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    return {key: _unflatten(item, tensor) for key, item in value["dict"]}
