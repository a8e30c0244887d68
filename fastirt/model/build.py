"""timm's models for the encoder: created from the configuration and checked; one-line errors."""

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
    "num_classes": "the model has no classifier",
    "pretrained": "--weights",
    "checkpoint_path": "--weights",
}


def create_model(
    config: ModelConfig, input_size: int, pretrained: bool = False, name: Optional[str] = None
) -> nn.Module:
    """The timm model without a classifier.

    Args:
        config: model, its arguments and its dropout.
        input_size: side of the input images in pixels.
        pretrained: whether to load timm's weights.
        name: a tag such as `deit_tiny_patch16_224.fb_in1k`, for other weights than the default.

    Raises:
        UserError: timm lacks the model, the model does not take the arguments or the size, or the
            weights cannot be downloaded.
    """
    _check_name(config.model)
    kwargs = parse_kwargs(config.model_kwargs)
    if pretrained and not _hub_answers():
        # Cached weights still load; others fail at once instead of after a minute of retries.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return _create(config, input_size, kwargs, pretrained, name)
    except UserError:
        raise
    except Exception as error:  # timm, hub, network and cache raise many unrelated types
        if pretrained:
            raise _download_error(name or config.model, error) from error
        raise UserError(_creation_error(config, kwargs, error)) from error


def check_model(vit: nn.Module, config: ModelConfig, input_size: int) -> None:
    """Raises UserError unless `vit` gives tokens that can be pooled for images of this size."""
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
    """`depth=4` to {"depth": 4}. Raises UserError."""
    parsed = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--model-kwargs {argument}: write it as key=value")
        if name in RESERVED_KWARGS:
            raise UserError(f"--model-kwargs {argument}: not allowed here: {RESERVED_KWARGS[name]}")
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[name] = value
    return parsed


def _create(
    config: ModelConfig, input_size: int, kwargs: dict[str, Any], pretrained: bool = False, name: Optional[str] = None
) -> nn.Module:
    # The public code's `drop_rate` (timm 0.5) meant these two; today's only affects the classifier.
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
    """Run the model once: some have blocks and patches, but return maps, dicts or pooled vectors.

    Raises UserError.
    """
    try:
        shape = _token_shape(vit, config, input_size)
    except Exception as error:  # models raise many types for an unsupported size
        raise UserError(
            f"--model {config.model}: cannot run on RGB images of --input-size {input_size}: {first_line(error)}"
        ) from error
    if len(shape) != 3 or shape[2] != vit.num_features or shape[1] <= vit.num_prefix_tokens:
        raise UserError(_not_plain(config.model))


def _token_shape(vit: nn.Module, config: ModelConfig, input_size: int) -> tuple[int, ...]:
    device = next(vit.parameters()).device
    training = vit.training
    try:
        with torch.device(device), torch.no_grad():
            return tuple(vit.eval().forward_features(torch.zeros(1, 3, input_size, input_size)).shape)
    except Exception:
        if device.type != "meta":
            raise
    finally:
        vit.train(training)
    # The meta device may lack an operation of the model: run it on the CPU.
    return _token_shape(create_model(config, input_size), config, input_size)


def _check_name(model: str) -> None:
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise UserError(f"--model {model}: timm has no such model; close names: {', '.join(close) or 'none'}")


def _meta_model(config: ModelConfig, input_size: int) -> nn.Module:
    """The model on the meta device, without weights; on the CPU if timm cannot create it there."""
    _check_name(config.model)
    try:
        with torch.device("meta"):
            return _create(config, input_size, parse_kwargs(config.model_kwargs))
    except Exception:
        return create_model(config, input_size)  # raises UserError if the model is at fault


def _creation_error(config: ModelConfig, kwargs: dict[str, Any], error: Exception) -> str:
    """timm's error in terms of the model and the user's arguments."""
    message = first_line(error)
    match = re.search(r"unexpected keyword argument(?:\(s\))?:? (.*)", message)
    if match is None:
        return f"--model {config.model}: not a vision transformer that takes these settings: {message}"
    named = re.findall(r"'(\w+)'", match[1])
    unknown = next((name for name in named if name in kwargs), None)
    if unknown is not None and _can_be_created(config):
        return f"--model-kwargs {unknown}={kwargs[unknown]}: {config.model} has no argument {unknown}: leave it out"
    if set(named) & {"pos_drop_rate", "proj_drop_rate"}:
        return f"--drop {config.drop}: {config.model} has no dropout inside its blocks: leave --drop out"
    return _not_plain(config.model)


def _not_plain(model: str) -> str:
    return (
        f"--model {model}: not a plain vision transformer, whose output is one row of patch tokens: "
        "choose one of timm's vit_*, deit*, beit*, eva* or cait_*"
    )


def _can_be_created(config: ModelConfig) -> bool:
    """Whether timm accepts the model without the user's arguments."""
    try:
        with torch.device("meta"):
            _create(config, 224, {})
    except Exception as error:
        return "unexpected keyword" not in str(error)
    return True


def _hub_answers() -> bool:
    """Whether the hub's host name resolves; assumed behind a proxy."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443))
    except OSError:
        return False


def _download_error(model: str, error: Exception) -> UserError:
    return UserError(
        f"--model {model}: pretrained weights could not be downloaded ({type(error).__name__}: {first_line(error)}); "
        "pass --weights FILE (.safetensors or .pth), or --weights scratch for random weights"
    )


def build_encoder(config: ModelConfig, input_size: int) -> Encoder:
    """The encoder with its weights, on the CPU. Weights are random only for `scratch`.

    Args:
        config: model, weights, pooling, dropout and precision.
        input_size: side of the input images in pixels.

    Raises:
        UserError: an unknown or unsuitable model, a size that is no multiple of its patch, or
            weights that cannot be downloaded, read or used for the model.
    """
    with torch.random.fork_rng(devices=[]):  # random weights are drawn for the final model only
        check_model(_meta_model(config, input_size), config, input_size)
    if config.weights is not None and not _is_tag(config.weights):
        vit = create_model(config, input_size)
        if config.weights != "scratch":
            load_weights(vit, Path(config.weights))
    else:
        if config.weights is not None and config.weights.split(".")[0] != config.model.split(".")[0]:
            raise UserError(f"--weights {config.weights}: belong to another model than --model {config.model}")
        vit = create_model(config, input_size, pretrained=True, name=config.weights)
    return Encoder(vit, config, input_size)


def _is_tag(weights: str) -> bool:
    """Whether `weights` is a timm name, such as deit_tiny_patch16_224.fb_in1k, and no file."""
    return not Path(weights).exists() and timm.is_model(weights)
