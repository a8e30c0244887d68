"""The line of Python that loads a saved model in timm and computes the run's descriptors."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, Iterator, Optional

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastirt.config.options import Config, ModelConfig
from fastirt.model.build import parse_kwargs
from fastirt.model.encoder import Encoder, normalization_constants

log = logging.getLogger("fastirt")

NO_LINE = "no line of timm gives this run's descriptors: use `fastirt evaluate`, or the Encoder of fastirt"
TOLERANCE = 1e-5  # of a descriptor's elements
POOLINGS = {"cls": "token", "mean": "avg", "max": "max"}  # timm's names
NORMS = ({}, {"fc_norm": False}, {"fc_norm": True}, {"use_fc_norm": False}, {"use_fc_norm": True})


def log_loading_line(encoder: Encoder, config: Config, path: Path) -> None:
    """How to load the model file in plain timm."""
    line = loading_line(encoder, path)
    mean, std = (tuple(round(v, 4) for v in values) for values in normalization_constants(config, encoder))
    log.info("in plain timm, x of mean %s and std %s: %s", mean, std, line or NO_LINE)


def loading_line(encoder: Encoder, path: Path) -> Optional[str]:
    """`model = timm.create_model(…, checkpoint_path=path).eval(); z = F.normalize(…, dim=1)`.

    With `timm` and `torch.nn.functional as F` imported, and x (B, 3, S, S) normalized like the
    run's images, z (B, D) equals the encoder's output within TOLERANCE. None if no such line
    exists. Depends only on the architecture; does not change the random state.
    """
    found = timm_call(encoder)
    if found is None:
        return None
    kwargs, descriptor = found
    arguments = ", ".join([repr(encoder.config.model), *(f"{name}={value!r}" for name, value in kwargs.items())])
    return f"model = timm.create_model({arguments}, checkpoint_path={str(path)!r}).eval(); z = {_unit(descriptor)}"


def timm_call(encoder: Encoder) -> Optional[tuple[dict[str, Any], str]]:
    """(arguments of `timm.create_model`, expression of `model` and `x`) for the run's descriptors
    before their normalization; None if there is none. Conditions are those of `loading_line`.
    """
    config = dataclasses.replace(encoder.config, weights="scratch", drop=0.0, drop_path=0.0)
    try:
        found = _recipe(type(encoder), config, encoder.input_size)
    except Exception as error:  # a run must not fail because of this hint
        log.debug("loading line: %s", error)
        return None
    return None if found is None else (dict(found[0]), found[1])


@functools.lru_cache(maxsize=32)
def _recipe(kind: type[Encoder], config: ModelConfig, input_size: int) -> Optional[tuple[dict[str, Any], str]]:
    """(arguments of create_model, descriptor expression) that agree with the encoder, or None.

    Compared on random images, with one block if the model takes `depth`, because large models take
    minutes on a CPU.
    """
    arguments = {"num_classes": 0, "img_size": input_size, **parse_kwargs(config.model_kwargs)}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        shallow, vit = _shallow(config.model, arguments)
        # Initial values hide differences: tokens are zero and norms the identity.
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = torch.randn(2, 3, input_size, input_size)
        expected = kind(vit, config, input_size).eval()(images)
        for changes, descriptor in _candidates(vit, config):
            if _agrees(config.model, {**shallow, **changes}, vit, descriptor, images, expected) and _same_tensors(
                config.model, arguments, changes
            ):
                return {**arguments, **changes}, descriptor
    return None


def _candidates(vit: nn.Module, config: ModelConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """(changed arguments, expression): plain calls of the model first, then pooled tokens."""
    yield {}, "model(x)"
    if config.pooling in POOLINGS:
        for norm in NORMS:
            yield {"global_pool": POOLINGS[config.pooling], **norm}, "model(x)"
    patches = f"[:, {vit.num_prefix_tokens}:]" if vit.num_prefix_tokens else ""
    pooled = {
        "cls": "[:, 0]",
        "mean": f"{patches}.mean(1)",
        "max": f"{patches}.amax(1)",
        "gem": f"{patches}.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)",
    }[config.pooling]
    if config.pooling == "cls" and config.eval_descriptor == "cls+dist":
        yield {}, "model.forward_features(x)[:, :2].mean(1)"
    yield {}, f"model.forward_features(x){pooled}"
    yield {}, f"model.fc_norm(model.forward_features(x){pooled})"


def _shallow(name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """(arguments, model) with one block, or with all blocks if the model does not take `depth`."""
    try:
        return {**arguments, "depth": 1}, timm.create_model(name, **{**arguments, "depth": 1})
    except Exception:
        return arguments, timm.create_model(name, **arguments)


def _agrees(
    name: str, kwargs: dict[str, Any], vit: nn.Module, descriptor: str, images: Tensor, expected: Tensor
) -> bool:
    try:
        model = timm.create_model(name, **kwargs).eval()
        model.load_state_dict(vit.state_dict(), strict=True)  # as checkpoint_path does
        z = eval(_unit(descriptor), {"model": model, "x": images, "F": F})  # only text of this file
    except Exception:  # the model does not take these arguments, or its tensors differ
        return False
    return z.shape == expected.shape and bool((z - expected).abs().max() <= TOLERANCE)


def _same_tensors(name: str, arguments: dict[str, Any], changes: dict[str, Any]) -> bool:
    """Whether the model's tensors keep names and shapes with `changes`, so that a file fits."""
    with torch.device("meta"):
        before, after = (
            timm.create_model(name, **kwargs).state_dict() for kwargs in (arguments, {**arguments, **changes})
        )
    return {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}


def _unit(descriptor: str) -> str:
    return f"F.normalize({descriptor}, dim=1)"
