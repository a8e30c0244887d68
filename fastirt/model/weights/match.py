"""Find a timm model's weights among the tensors of a checkpoint, by prefix and names."""

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
# Parts of a prefix that mark averaged weights, and those that mark a copy of the main model.
AVERAGED = re.compile(r"(^|_)ema($|_)|^teacher(_|$)|^averaged(_|$)")
SECONDARY = re.compile(r"^(student|twin|target|momentum|key)(_|$)|^encoder_k$|^optimizer")
BILINEAR = ("flexi", "radio")  # models whose position embeddings timm resamples bilinearly


@dataclass
class Match:
    """A model's weights in a file."""

    prefix: str  # of its names in the file, "" or ending in a dot
    raw: dict[str, Tensor]  # by the file's names without the prefix
    state: dict[str, Tensor]  # by timm's names, float32
    others: list[str]  # prefixes with the same names and other values
    rivals: list[str]  # those of `others` with the same rank: the choice is ambiguous

    @property
    def name(self) -> str:
        return _shown(self.prefix)

    @property
    def averaged(self) -> bool:
        return _rank(self.prefix) == 0


def find_model(tensors: dict[str, Tensor], vit: nn.Module) -> Match:
    """The prefix whose names, converted by timm, match most names of the model.

    In a tie averaged weights come first, and a student or a momentum copy last.
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
    return Match(chosen, raw, _converted(convert, raw), [_shown(prefix) for prefix in others], rivals)


def conversion(vit: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """timm's conversion of official checkpoints for this model, or the identity."""
    architecture = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    home = timm.models.model_entrypoint(architecture).__module__ if architecture else type(vit).__module__
    convert = getattr(sys.modules[home], "checkpoint_filter_fn", None)
    if convert is None:
        return lambda state: state
    takes = inspect.signature(convert).parameters
    # DeiT III has other names for layer scale.
    options: dict[str, Any] = {"adapt_layer_scale": True} if "adapt_layer_scale" in takes else {}
    if "antialias" in takes and any(word in (architecture or "") for word in BILINEAR):
        options |= {"interpolation": "bilinear", "antialias": False}
    return lambda state: convert(state, vit, **options)


def _prefixes(tensors: dict[str, Tensor], at_least: int) -> list[str]:
    """The empty prefix, and each prefix of at least `at_least` names."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".", MAX_PREFIX)[:-1]
        counts.update("".join(f"{part}." for part in parts[:length]) for length in range(len(parts) + 1))
    return ["", *sorted(prefix for prefix, count in counts.items() if prefix and count >= max(at_least, 1))]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _converted(convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors converted by timm. Inconvertible ones stay, to be reported by name and shape."""
    unconvertible = ("pos_embed", "patch_embed.proj.weight")
    # timm prints a line for missing biases.
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        for kept in ((), unconvertible[:1], unconvertible):
            state = {name: value for name, value in part.items() if name not in kept}
            with contextlib.suppress(Exception):  # timm raises many types for unexpected shapes
                converted = {name: value for name, value in convert(state).items() if isinstance(value, Tensor)}
                return converted | {name: part[name] for name in kept if name in part}
    return part


def _rank(prefix: str) -> int:
    parts = prefix.split(".")
    if any(AVERAGED.search(part) for part in parts):
        return 0
    return 2 if any(SECONDARY.search(part) for part in parts) else 1


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether tensors of equal names differ; without common names it is one model."""
    common = [name for name in one if name in other]
    return bool(common) and not all(_same(one[name], other[name]) for name in common)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not is_plain(one) or not is_plain(other):
        return False
    return torch.equal(one.float(), other.float())


def is_plain(value: Tensor) -> bool:
    """Whether the tensor is dense, real and on the CPU: not sparse, quantized or complex."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and not value.is_complex()


def _shown(prefix: str) -> str:
    return prefix.rstrip(".") or "the tensors outside any part"
