"""`fastirt.load`: a model from a run, a file, or timm."""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path
from typing import Any, Mapping, Optional

import timm
import torch

from fastirt.config.components import InputConfig
from fastirt.config.option_values import option_name, option_value
from fastirt.config.options import Config
from fastirt.config.run_files import RunFiles
from fastirt.distributed.device import choose_device
from fastirt.distributed.ranks import SINGLE_PROCESS
from fastirt.errors import UserError
from fastirt.images.decoders.choose import choose_loader
from fastirt.inference.model import Model
from fastirt.model.build import build_encoder
from fastirt.model.onednn_linear import is_available, use_onednn
from fastirt.objective.self_check import replace_faulty_kernels
from fastirt.run_config import config_of_run, described_by_file, finalized, fresh_config

log = logging.getLogger("fastirt")


def load(
    source: str | Path,
    *,
    pretrained: bool = True,
    weights: Optional[str | Path] = None,
    device: Optional[str | torch.device] = None,
    engine: str = "eager",
    options: Optional[Mapping[str, Any]] = None,
) -> Model:
    """A model to embed images with.

    Args:
        source: a run's folder; a model file that a run or `Model.save` wrote, or a checkpoint; or a
            timm model, such as `deit_small_patch16_224` or `vit_base_patch16_224.dino`.
        pretrained: of a timm model: its weights; False: random ones, the same each time.
        weights: of a timm model: a file in any format that `fastirt train --weights` reads.
        device: default: a GPU if there is one.
        engine: "eager", as in evaluation; "onednn": fp32 on a CPU by oneDNN's linear layers, up to
            rounding (1e-6) the same, faster on AMD's CPUs.
        options: flags of `fastirt evaluate` by name in place of the model's own, such as
            `{"loader": "pil", "precision": "fp32"}`.

    Raises:
        UserError: there is no such model, or its files do not fit.
    """
    place = choose_device(None if device is None else str(device))
    options = {name: option_value(name, value, f"options: {name}") for name, value in _named(options or {}).items()}
    config = _config(os.fspath(source), pretrained, weights, options)
    if "loader" not in options:
        config = config.replace(loader=_decoder(config.input.loader, place))
    config = finalized(config, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model, config.input.input_size)
    if engine == "onednn":
        if place.type != "cpu" or config.model.precision != "fp32" or not is_available():
            raise UserError(
                f"engine onednn: needs a CPU and fp32, not {place} in {config.model.precision}: leave it out"
            )
        use_onednn(encoder, in_evaluation=True)
    elif engine != "eager":
        raise UserError(f"engine {engine}: must be eager or onednn")
    if place.type == "cuda":
        replace_faulty_kernels(config, SINGLE_PROCESS)
    return Model(encoder, config, place, engine)


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    return {option_name(key, f"options: {key}"): value for key, value in options.items()}


def _config(source: str, pretrained: bool, weights: Optional[str | Path], flags: dict[str, Any]) -> Config:
    path = Path(os.path.abspath(os.path.expanduser(source)))
    flags = {"num_workers": InputConfig().num_workers, **flags}
    named = not path.exists() and timm.is_model(source)
    if weights is not None and not named:
        raise UserError(f"{source}: weights {weights} are for a timm model, which this is not: leave them out")
    if path.is_dir() and RunFiles(path).config.is_file():
        return config_of_run(path, flags)[0]
    if path.exists():
        flags["weights"] = str(path)
        described = described_by_file(flags)
        if "model" not in {**described, **flags}:
            raise UserError(
                f"{source}: does not say which model it is of: "
                f"pass the model's name, as in fastirt.load(NAME, weights={source!r})"
            )
        return _fresh({**described, **flags})
    if not named:
        close = difflib.get_close_matches(source, timm.list_models(), n=3)
        raise UserError(
            f"{source}: no run folder, no model file and no model of timm; close names: {', '.join(close) or 'none'}"
        )
    if weights is not None:
        flags["weights"] = os.fspath(weights)
    elif not pretrained:
        flags["weights"] = "scratch"
    flags = {"model": source, **flags}
    return _fresh({**described_by_file(flags), **flags})


def _decoder(name: str, device: torch.device) -> str:
    """The run's decoder; where it does not work here, the fastest that does, with a warning."""
    try:
        return choose_loader(name, device)
    except UserError as error:
        found = choose_loader("auto", device)
        log.warning("%s; taken instead: %s, whose pixels differ slightly", error, found)
        return found


def _fresh(flags: dict[str, Any]) -> Config:
    """Options of a model off the shelf: images of a user are turned upright by their EXIF data."""
    return fresh_config({"dataset": "folder", "data_path": ".", **flags}, "evaluate", SINGLE_PROCESS)
