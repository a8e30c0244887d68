"""A run's model as a file that plain timm loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastirt.config.options import Config
from fastirt.model.encoder import Encoder
from fastirt.model.weights.load import write_model
from fastirt.model.weights.timm_line import loading_line


def save_model(encoder: Encoder, path: Path, config: Config) -> None:
    """The timm model's weights as .safetensors, which the line of `loading_line` loads in plain timm.

    The file's metadata holds that line, and says how images get to the model, so that an evaluation of the file alone
    feeds it as the run did.
    """
    own = dataclasses.replace(config, model=encoder.config).replace(input_size=encoder.input_size)
    write_model(encoder.vit.state_dict(), path, description(own), loading_line(encoder, path))


def description(config: Config) -> dict[str, Any]:
    """What an evaluation of the weights alone needs to know of the run, by option."""
    return {
        "method": config.method,
        "recipe": config.recipe,
        "model": config.model.model,
        "model_kwargs": config.model.model_kwargs,
        "pooling": config.model.pooling,
        "eval_descriptor": config.model.eval_descriptor,
        "input_size": config.input.input_size,
        "resize": config.input.resize,
        "resize_size": config.input.resize_size,
        "orientation": config.input.orientation,
        "normalization": config.input.normalization,
    }
