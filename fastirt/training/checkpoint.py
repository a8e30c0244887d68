"""The checkpoint file: one safetensors file, written whole or not at all, read without unpickling
anything.

With a sharded memory each rank first writes a file of its own (`save_shard`); the checkpoint, which
names them all, is written last and makes them valid.

Tensors lie flat under their path in the state (`module.encoder.vit.cls_token`,
`optimizer.state.0.exp_avg`). Everything else is JSON in the file's metadata, with
`{"tensor": path}` in the place of a tensor, and likewise for dicts, lists, tuples and dtypes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastirt.atomic import atomic_write
from fastirt.config.run_files import RunFiles
from fastirt.errors import UserError, first_line

FORMAT = "fastirt checkpoint 1"
SHARD = "fastirt memory 1"


def save(path: Path, state: dict[str, Any], keep: Optional[int] = None) -> None:
    """Write `state`, a tree of dicts, lists, tensors and JSON values, to a temporary file that is
    renamed to `path`.

    keep: how many of the newest `step_*.safetensors` stay in the folder; None keeps all.
    Raises UserError where the disk refuses.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    for stale in path.parent.glob(".*.tmp"):  # left by a save that was killed
        stale.unlink(missing_ok=True)
    _write(path, tensors, {"format": FORMAT, "state": json.dumps(tree)})
    for shard in path.parent.glob("memory_*.safetensors"):  # left by a save that was killed
        if not shard.with_name(f"step_{shard.stem.split('_')[1]}.safetensors").exists():
            shard.unlink(missing_ok=True)
    if keep is not None:
        earlier = [old for old in sorted(path.parent.glob("step_*.safetensors")) if old.name < path.name]
        for old in earlier[: len(earlier) - max(1, keep) + 1]:
            _remove(old)


def save_shard(path: Path, rank: int, size: int, first: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write one rank's slots of the memory, from `first` on, beside the checkpoint `path`.

    Returns the shard's entry for the checkpoint: file, first, count. Raises UserError where the
    disk refuses.
    """
    entry = shard_entry(path, rank, size, first, len(tensors["labels"]))
    file = path.with_name(entry["file"])
    _write(file, {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {"format": SHARD})
    return entry


def shard_entry(path: Path, rank: int, size: int, first: int, count: int) -> dict[str, Any]:
    """What the checkpoint `path` says of a shard."""
    name = f"{path.stem.replace('step', 'memory')}_{rank + 1}-of-{size}.safetensors"
    return {"file": name, "first": first, "count": count}


def load_shards(path: Path, shards: list[dict[str, Any]], first: int, count: int) -> dict[str, torch.Tensor]:
    """Slots first .. first + count of a memory that `save_shard` wrote in any number of files.

    Raises UserError for a damaged one.
    """
    parts: dict[str, list[torch.Tensor]] = {"embeddings": [], "labels": []}
    for shard in sorted(shards, key=lambda shard: shard["first"]):
        begin = max(first, shard["first"]) - shard["first"]
        end = max(begin, min(first + count - shard["first"], shard["count"]))
        file = path.with_name(Path(shard["file"]).name)
        try:
            with safe_open(file, framework="pt") as open_file:
                if (open_file.metadata() or {}).get("format") != SHARD:
                    raise ValueError("not a shard of a memory")
                for name, pieces in parts.items():
                    pieces.append(
                        open_file.get_slice(name)[begin:end] if begin < end else open_file.get_slice(name)[0:0]
                    )
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{file}: damaged or missing ({first_line(error)}); resume from an older checkpoint"
            ) from error
    whole = {name: torch.cat(pieces) for name, pieces in parts.items()}
    if len(whole["labels"]) != count:
        raise UserError(f"{path}: its shards do not cover the memory; resume from an older checkpoint")
    return whole


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); earlier checkpoints are untouched: free space or choose another "
            "--output-dir, then --resume"
        ) from error


def _remove(path: Path) -> None:
    """Delete a checkpoint, then its shards, so that none is ever without its shards."""
    path.unlink(missing_ok=True)
    for shard in path.parent.glob(f"{path.stem.replace('step', 'memory')}_*.safetensors"):
        shard.unlink(missing_ok=True)


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
        raise UserError(f"{path}: damaged checkpoint ({first_line(error)}); resume from an older one") from error


def describe(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, None for each tensor; reads the header. {} if unreadable."""
    try:
        with safe_open(path, framework="pt") as file:
            state = _unflatten(json.loads((file.metadata() or {})["state"]), lambda name: None)
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def delete_newer(path: Path) -> None:
    """Delete the checkpoints newer than `path` in its folder; resuming recomputes those steps."""
    for later in path.parent.glob("step_*.safetensors"):
        if later.name > path.name:
            _remove(later)


def latest(path: Path) -> Optional[Path]:
    """The newest checkpoint of a run folder, or the file itself; None without any."""
    if path.is_file():
        return path
    files = sorted(RunFiles(path).checkpoints.glob("step_*.safetensors"))
    return files[-1] if files else None


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
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
