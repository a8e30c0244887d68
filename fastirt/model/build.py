"""timm's models for the encoder: made from the configuration, checked, and refused in one line that a user can act on."""

from __future__ import annotations

import ast
import difflib
import math
import os
import re
import socket
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from torch import nn

from fastirt.config.options import ModelConfig
from fastirt.errors import UserError, first_line
from fastirt.model.encoder import Encoder
from fastirt.model.weights.load import load_weights

RESERVED_KWARGS = {
    "img_size": "--input-size",
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
    "num_classes": "there is no classifier",
    "pretrained": "--weights",
    "checkpoint_path": "--weights",
}


def create_model(
    config: ModelConfig, input_size: int, pretrained: bool = False, name: Optional[str] = None
) -> nn.Module:
    """The timm model without a classifier, checked. name: a tag of the model whose weights are meant, instead of its default.

    Raises UserError for an unknown or unsuitable model, settings that it does not take, a size that is no multiple of its
    patch, and pretrained weights that cannot be downloaded.
    """
    if not timm.is_model(config.model):
        close = difflib.get_close_matches(config.model, timm.list_models(), n=3)
        raise UserError(f"--model {config.model}: timm has no such model; close names: {', '.join(close) or 'none'}")
    kwargs = parse_kwargs(config.model_kwargs)
    if pretrained and not _hub_answers():
        # what was downloaded earlier still loads; the rest fails at once, not after a minute
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return _create(config, input_size, kwargs, pretrained, name)
    except UserError:
        raise
    except Exception as error:  # timm, hub, network and cache raise a dozen unrelated types
        if pretrained:
            raise _no_weights(name or config.model, error) from error
        raise UserError(_refusal(config, kwargs, error)) from error


def check_model(vit: nn.Module, config: ModelConfig, input_size: int) -> None:
    """Raise UserError unless the encoder can use the model: tokens of patches, pooled as asked, for images of this size."""
    patch_size = getattr(getattr(vit, "patch_embed", None), "patch_size", None)
    if not isinstance(patch_size, tuple) or not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "blocks"):
        raise UserError(_not_plain(config.model))
    if config.pooling == "cls" and getattr(vit, "cls_token", None) is None:
        raise UserError(f"--model {config.model} has no CLS token: pass --pooling mean, max or gem")
    patch = math.lcm(*patch_size)
    if input_size % patch:
        below = input_size // patch * patch
        sizes = f"{below} or {below + patch}" if below else str(patch)
        raise UserError(f"--input-size {input_size}: must be a multiple of the model's patch, {patch}: use {sizes}")
    _check_tokens(vit, config, input_size)


def parse_kwargs(arguments: tuple[str, ...]) -> dict[str, Any]:
    """`depth=4` to {"depth": 4}."""
    parsed = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--model-kwargs {argument}: write it as key=value")
        if name in RESERVED_KWARGS:
            raise UserError(f"--model-kwargs {argument}: has a flag of its own: {RESERVED_KWARGS[name]}")
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[name] = value
    return parsed


def _create(
    config: ModelConfig, input_size: int, kwargs: dict[str, Any], pretrained: bool = False, name: Optional[str] = None
) -> nn.Module:
    # `drop_rate` of timm 0.5, which the public code uses, meant these two; today's touches the classifier alone.
    dropout = {"pos_drop_rate": config.drop, "proj_drop_rate": config.drop} if config.drop else {}
    return timm.create_model(
        name or config.model,
        pretrained=pretrained,
        num_classes=0,
        img_size=input_size,
        drop_path_rate=config.drop_path,
        **dropout,
        **kwargs,
    )


def _check_tokens(vit: nn.Module, config: ModelConfig, input_size: int) -> None:
    """Run the model once, without arithmetic: some have blocks and patches, but put out maps, dicts or pooled vectors."""
    try:
        shape = _token_shape(vit, config, input_size)
    except Exception as error:  # whatever a model raises for a size that it does not take
        raise UserError(
            f"--model {config.model}: cannot run on RGB images of --input-size {input_size}: {first_line(error)}"
        ) from error
    if len(shape) != 3 or shape[2] != vit.num_features or shape[1] <= vit.num_prefix_tokens:
        raise UserError(_not_plain(config.model))


def _token_shape(vit: nn.Module, config: ModelConfig, input_size: int) -> tuple[int, ...]:
    try:
        with torch.device("meta"), torch.no_grad():
            twin = _create(config, input_size, parse_kwargs(config.model_kwargs)).eval()
            return tuple(twin.forward_features(torch.empty(1, 3, input_size, input_size)).shape)
    except Exception:  # an operation that the meta device lacks: run the model itself
        training = vit.training
        try:
            with torch.no_grad():
                images = torch.zeros(1, 3, input_size, input_size, device=next(vit.parameters()).device)
                return tuple(vit.eval().forward_features(images).shape)
        finally:
            vit.train(training)


def _refusal(config: ModelConfig, kwargs: dict[str, Any], error: Exception) -> str:
    """Speaks of the model and the user's own arguments, not of timm's constructors."""
    message = first_line(error)
    found = re.search(r"unexpected keyword argument(?:\(s\))?:? (.*)", message)
    if found is None:
        return f"--model {config.model}: not a vision transformer that takes these settings: {message}"
    named = re.findall(r"'(\w+)'", found[1])
    theirs = [name for name in named if name in kwargs]
    if theirs and _can_be_made(config):
        return (
            f"--model-kwargs {theirs[0]}={kwargs[theirs[0]]}: {config.model} has no argument {theirs[0]}: leave it out"
        )
    if set(named) & {"pos_drop_rate", "proj_drop_rate"}:
        return f"--drop {config.drop}: {config.model} has no dropout inside its blocks: leave --drop out"
    return _not_plain(config.model)


def _not_plain(model: str) -> str:
    return (
        f"--model {model}: not a plain vision transformer, whose output is one row of patch tokens: "
        "choose one of timm's vit_*, deit*, beit*, eva* or cait_*"
    )


def _can_be_made(config: ModelConfig) -> bool:
    """Whether timm makes the model without the user's arguments; else the model itself is at fault."""
    try:
        with torch.device("meta"):
            _create(config, 224, {})
    except Exception as error:
        return "unexpected keyword" not in str(error)
    return True


def _hub_answers() -> bool:
    """Whether the hub's name resolves; behind a proxy nobody can tell."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443))
    except OSError:
        return False


def _no_weights(model: str, error: Exception) -> UserError:
    return UserError(
        f"--model {model}: pretrained weights could not be downloaded ({type(error).__name__}: {first_line(error)}); pass --weights FILE "
        "(.safetensors or .pth), or --weights scratch for random ones"
    )


def build_encoder(config: ModelConfig, input_size: int) -> Encoder:
    """The encoder with its weights. Raises UserError for an unknown or unsuitable model, a size that is no multiple of the
    patch, or weights that cannot be had; weights are never random unless `scratch` was asked for."""
    vit = create_model(config, input_size)
    check_model(vit, config, input_size)
    if config.weights is None or _is_tag(config.weights):
        if config.weights is not None and config.weights.split(".")[0] != config.model.split(".")[0]:
            raise UserError(f"--weights {config.weights}: are of another model than --model {config.model}")
        vit = create_model(config, input_size, pretrained=True, name=config.weights)
    elif config.weights != "scratch":
        load_weights(vit, Path(config.weights))
    return Encoder(vit, config, input_size)


def _is_tag(weights: str) -> bool:
    """Whether this is a timm name, such as deit_tiny_patch16_224.fb_in1k, and no file."""
    return not Path(weights).exists() and timm.is_model(weights)
