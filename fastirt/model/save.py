"""A run's model as a file that timm loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastirt.config.options import Config
from fastirt.model.encoder import Encoder
from fastirt.model.weights.load import write_model
from fastirt.model.weights.timm_line import loading_line


def save_model(encoder: Encoder, path: Path, config: Config) -> None:
    """Write the timm model's weights as .safetensors, atomically.

    The metadata holds the line of Python that loads the file in timm (`loading_line`), and the
    options that an evaluation of the file needs to repeat the run's preprocessing and pooling.

    Args:
        encoder: its `vit` is saved, without momentum encoder or bf16 copy.
        path: file to write.
        config: the run's options.

    Raises:
        UserError: the file cannot be written.
    """
    described = dataclasses.replace(config, model=encoder.config).replace(input_size=encoder.input_size)
    write_model(encoder.vit.state_dict(), path, description(described), loading_line(encoder, path))


def description(config: Config) -> dict[str, Any]:
    """The options that an evaluation of the weights needs, by name."""
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
