"""The line of Python that loads a saved model in plain timm and gives the run's own descriptors."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Optional

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastirt.config.options import ModelConfig
from fastirt.model.build import parse_kwargs

if TYPE_CHECKING:
    from fastirt.model.encoder import Encoder

log = logging.getLogger("fastirt")

NO_LINE = "no line of plain timm gives this run's descriptors: use `fastirt evaluate`, or the Encoder of fastirt"
TOLERANCE = 1e-5
POOLINGS = {"cls": "token", "mean": "avg", "max": "max"}  # timm's names
NORMS = ({}, {"fc_norm": False}, {"fc_norm": True}, {"use_fc_norm": False}, {"use_fc_norm": True})


def loading_line(encoder: Encoder, path: Path) -> Optional[str]:
    """`model = timm.create_model(…, checkpoint_path=path).eval(); z = F.normalize(…, dim=1)`, or None where no such line is exact.

    With `timm` and `torch.nn.functional as F` imported, and x (B, 3, S, S) normalised as the run normalised its images, z
    (B, D) is what the encoder gives for x, to 1e-5. Depends on the architecture alone; leaves the random state as it was.
    """
    config = dataclasses.replace(encoder.config, weights="scratch", drop=0.0, drop_path=0.0)
    try:
        recipe = _recipe(type(encoder), config, encoder.input_size)
    except Exception as error:  # a run must not fail for want of advice
        log.debug("loading line: %s", error)
        return None
    if recipe is None:
        return None
    kwargs, descriptor = recipe
    arguments = ", ".join([repr(config.model), *(f"{name}={value!r}" for name, value in kwargs.items())])
    return f"model = timm.create_model({arguments}, checkpoint_path={str(path)!r}).eval(); z = {_unit(descriptor)}"


@functools.lru_cache(maxsize=32)
def _recipe(kind: type[Encoder], config: ModelConfig, input_size: int) -> Optional[tuple[dict[str, Any], str]]:
    """Arguments of create_model and the expression of the descriptor: the first that agree with the encoder on random images.

    Compared with one block instead of all, where the model takes `depth`, because large models take minutes on a CPU.
    """
    given = {"num_classes": 0, "img_size": input_size, **parse_kwargs(config.model_kwargs)}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        shallow, vit = _shallow(config.model, given)
        for parameter in vit.parameters():  # initial values hide differences: tokens are zero, norms the identity
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = torch.randn(2, 3, input_size, input_size)
        expected = kind(vit, config, input_size).eval()(images)
        for changes, descriptor in _candidates(vit, config):
            if _agrees(config.model, {**shallow, **changes}, vit, descriptor, images, expected) and _same_tensors(
                config.model, given, changes
            ):
                return {**given, **changes}, descriptor
    return None


def _candidates(vit: nn.Module, config: ModelConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Plain calls of the model first, then tokens pooled in the line itself."""
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


def _shallow(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """The model with one block, and its arguments; with all blocks where it does not take `depth`."""
    try:
        return {**given, "depth": 1}, timm.create_model(name, **{**given, "depth": 1})
    except Exception:
        return given, timm.create_model(name, **given)


def _agrees(
    name: str, kwargs: dict[str, Any], vit: nn.Module, descriptor: str, images: Tensor, expected: Tensor
) -> bool:
    try:
        model = timm.create_model(name, **kwargs).eval()
        model.load_state_dict(vit.state_dict(), strict=True)  # as checkpoint_path does
        z = eval(_unit(descriptor), {"model": model, "x": images, "F": F})  # text of this file alone
    except Exception:  # the model does not take these arguments, or has other tensors then
        return False
    return z.shape == expected.shape and bool((z - expected).abs().max() <= TOLERANCE)


def _same_tensors(name: str, given: dict[str, Any], changes: dict[str, Any]) -> bool:
    """Whether the whole model keeps its tensors' names and shapes under these changes, so that a saved file fits."""
    with torch.device("meta"):
        ours, theirs = (timm.create_model(name, **kwargs).state_dict() for kwargs in (given, {**given, **changes}))
    return {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}


def _unit(descriptor: str) -> str:
    return f"F.normalize({descriptor}, dim=1)"
