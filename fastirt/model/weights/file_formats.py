"""Tensors from checkpoints of any common format, detected by content; runs none of their code."""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastirt.errors import UserError, first_line

MAX_DEPTH = 16  # of nested dicts
PICKLES = 5  # at the start of a file written by torch before 1.6
REMEDY = "use a .safetensors or .pth file of tensors"
FOREIGN = {  # first bytes of files that are often mistaken for weights
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "a web page or XML: download the file again",
    b"{": "JSON text",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "gzip-compressed: unpack it first",
    b"BZh": "bzip2-compressed: unpack it first",
    b"\xfd7zXZ": "xz-compressed: unpack it first",
    b"\x93NUMPY": "a single numpy array",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All CPU tensors of a file by path: {"model": {"norm.bias": t}} holds `model.norm.bias`.

    Reads safetensors, torch's zip and older formats (with weights_only=True) and .npz, whatever the
    file's name. Raises UserError for other content and names its format.
    """
    kind = file_kind(path)
    try:
        if kind == "safetensors":
            loaded: Any = load_file(path)
        elif kind == "npz":
            loaded = _load_npz(path)
        elif kind == "torch":
            loaded = _load_torch(path)
        else:
            raise _unreadable(path, kind)
    except UserError:
        raise
    except Exception as error:  # torch, pickle, zipfile and safetensors raise many unrelated types
        raise _unreadable(path, _reason(error)) from error
    tensors = {name: value for name, value in _flatten(loaded)}
    if not tensors:
        raise UserError(f"--weights {path}: holds no named tensors{_remark(loaded)}")
    return tensors


def file_kind(path: Path) -> str:
    """`safetensors`, `npz` or `torch`; for other content a description."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"{error.strerror}"
    if not head:
        return "empty"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head.startswith(b"\x80"):
        return "torch"
    foreign = (kind for start, kind in FOREIGN.items() if head.lstrip().startswith(start))
    return next(foreign, "damaged, or no file of weights")


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "damaged"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript model: save its state_dict() instead"
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    return "a zip archive, not a checkpoint: unpack it first"


def _load_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}


class Inert:
    """Stands for classes and functions that torch does not allow when unpickling; does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class InertMapping:
    """The same for subclasses of dict: torch fills in items only for plain and ordered dicts."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def _load_torch(path: Path) -> Any:
    """torch.load(weights_only=True) that ignores objects other than tensors, such as options.

    Every name in the pickle is mapped to an inert class, so nothing is imported. torch's own list
    of functions that rebuild tensors comes first, and its blocked modules (os, sys) stay blocked.
    """
    inert = [(InertMapping if name.lower().endswith("dict") else Inert, name) for name in _pickled_names(path)]
    with torch.serialization.safe_globals(inert), warnings.catch_warnings():
        # torch warns about pickle protocols and old storages; the result is checked later.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _pickled_names(path: Path) -> set[str]:
    """The classes and functions named in a torch file's pickles, as `module.name`, by opcode."""
    names: set[str] = set()
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                names.update(_globals(archive.read(member)))
            return names
        file.seek(0)
        for _ in range(PICKLES):
            names.update(_globals(file))
    return names


def _globals(stream: Any) -> Iterator[str]:
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                module, name = argument.split(" ", 1)
                yield f"{module}.{name}"
                module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                # Like pickle, torch renames some modules of Python 2.
                yield f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
    except (ValueError, IndexError, UnicodeDecodeError):  # no pickle; torch.load reports it
        return


def _flatten(loaded: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) for each tensor in nested dicts with text keys.

    Each dict is visited once, because a pickle may contain itself.
    """
    visited: set[int] = set()
    waiting = [("", loaded, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            if path:
                yield path, value.detach()
        elif isinstance(value, (dict, list, tuple)) and id(value) not in visited and depth < MAX_DEPTH:
            visited.add(id(value))
            if not isinstance(value, dict):  # a list of models, such as several averages
                value = {str(i): item for i, item in enumerate(value) if isinstance(item, dict)}
            items = [(f"{path}.{key}" if path else key, item) for key, item in value.items() if isinstance(key, str)]
            waiting.extend((name, item, depth + 1) for name, item in reversed(items))


def _remark(loaded: Any) -> str:
    if isinstance(loaded, dict):
        keys = ", ".join(str(key)[:40] for key in list(loaded)[:5] if isinstance(key, str))
        return f" (its keys: {keys}): {REMEDY}" if keys else f": {REMEDY}"
    if isinstance(loaded, Inert):
        return ": it is a whole pickled object, which is not unpickled; save its state_dict() instead"
    return f": it is a {type(loaded).__name__}: {REMEDY}"


def _reason(error: Exception) -> str:
    message = first_line(error)
    if "unsupported GLOBAL" in str(error):
        return "tries to run code of the operating system's modules, which weights never need: delete it"
    if "persistent_load" in message or "magic number" in message:
        return "a pickle that torch.save did not write"
    if "Unsupported operand" in str(error):
        return "saved by pickle itself or with another protocol than torch.save's: save it again with torch.save"
    if isinstance(error, pickle.UnpicklingError):
        return "holds objects other than tensors"
    return "damaged, or no file of weights"


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"--weights {path}: cannot be read: {reason}; {REMEDY}")
