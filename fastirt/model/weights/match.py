"""Find a timm model's weights among the tensors of a checkpoint: under which prefix, and under whose names."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable

import timm
import torch
from torch import Tensor, nn

MAX_PREFIX = 8  # parts of a prefix, as in module._orig_mod.model.backbone.
AVERAGED = re.compile(r"(^|_)ema($|_)|^teacher(_|$)|^averaged(_|$)")  # a part of a prefix that names averaged weights
SECONDARY = re.compile(r"^(student|twin|target|momentum|key)(_|$)|^encoder_k$|^optimizer")
BILINEAR = ("flexi", "radio")  # models whose tables timm resamples without antialiasing


@dataclass
class Found:
    """A model's weights in a file."""

    prefix: str  # what its names begin with in the file, "" or "…."
    raw: dict[str, Tensor]  # by the file's names without the prefix
    state: dict[str, Tensor]  # by timm's names, float32
    others: list[str]  # what else in the file has the same names with other values
    rivals: list[str]  # those of them that nothing ranks below this one

    @property
    def name(self) -> str:
        return _shown(self.prefix)

    @property
    def averaged(self) -> bool:
        return _rank(self.prefix) == 0


def find_model(tensors: dict[str, Tensor], vit: nn.Module) -> Found:
    """The part of a file whose names, as timm converts them, match most of the model's.

    Among equals averaged weights come first, and a student or a momentum copy last.
    """
    expected = vit.state_dict()
    convert = conversion(vit)
    parts = {prefix: _part(tensors, prefix) for prefix in _prefixes(tensors, len(expected) // 2)}
    scores = {prefix: sum(name in expected for name in _converted(convert, part)) for prefix, part in parts.items()}
    best = max(scores.values())
    equals = sorted((prefix for prefix in parts if scores[prefix] == best), key=_rank)
    chosen = equals[0]
    raw = {
        name: value.float() if is_plain(value) and value.is_floating_point() else value
        for name, value in parts[chosen].items()
    }
    partial = [prefix for prefix in parts if _rank(prefix) == 0 and _rank(chosen) and scores[prefix] < best]
    others = [prefix for prefix in equals[1:] + partial if best and _differ(parts[chosen], parts[prefix])]
    rivals = [_shown(prefix) for prefix in others if _rank(prefix) == _rank(chosen)]
    return Found(chosen, raw, _converted(convert, raw), [_shown(prefix) for prefix in others], rivals)


def conversion(vit: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """timm's own conversion of official checkpoints for this model; for models without one the identity."""
    architecture = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    home = timm.models.model_entrypoint(architecture).__module__ if architecture else type(vit).__module__
    convert = getattr(sys.modules[home], "checkpoint_filter_fn", None)
    if convert is None:
        return lambda state: state
    takes = inspect.signature(convert).parameters
    options: dict[str, Any] = {"adapt_layer_scale": True} if "adapt_layer_scale" in takes else {}  # DeiT III's names
    if "antialias" in takes and any(word in (architecture or "") for word in BILINEAR):
        options |= {"interpolation": "bilinear", "antialias": False}
    return lambda state: convert(state, vit, **options)


def _prefixes(tensors: dict[str, Tensor], at_least: int) -> list[str]:
    """Each prefix that enough names share, the empty one first."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".", MAX_PREFIX)[:-1]
        counts.update("".join(f"{part}." for part in parts[:length]) for length in range(len(parts) + 1))
    return ["", *sorted(prefix for prefix, count in counts.items() if prefix and count >= max(at_least, 1))]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _converted(convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], part: dict[str, Tensor]) -> dict[str, Tensor]:
    """As timm converts it. What cannot be converted stays as it is, so that it is reported by its name and shape."""
    unconvertible = ("pos_embed", "patch_embed.proj.weight")
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):  # timm prints where a model has no bias
        for kept in ((), unconvertible[:1], unconvertible):
            state = {name: value for name, value in part.items() if name not in kept}
            with contextlib.suppress(Exception):  # whatever tensors of unexpected shapes raise in there
                converted = {name: value for name, value in convert(state).items() if isinstance(value, Tensor)}
                return converted | {name: part[name] for name in kept if name in part}
    return part


def _rank(prefix: str) -> int:
    parts = prefix.split(".")
    if any(AVERAGED.search(part) for part in parts):
        return 0
    return 2 if any(SECONDARY.search(part) for part in parts) else 1


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether tensors of one name differ; parts with other names are the same model under a longer prefix."""
    common = [name for name in one if name in other]
    return bool(common) and not all(_same(one[name], other[name]) for name in common)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not is_plain(one) or not is_plain(other):
        return False
    return torch.equal(one.float(), other.float())


def is_plain(value: Tensor) -> bool:
    """Whether it is a plain tensor of real numbers with its values at hand (not sparse, quantised, complex or on `meta`)."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and not value.is_complex()


def _shown(prefix: str) -> str:
    return prefix.rstrip(".") or "the tensors outside any part"
