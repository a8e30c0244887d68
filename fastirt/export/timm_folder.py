"""A folder that plain timm loads: weights, architecture, pooling and preprocessing."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image

from fastirt.datasets import Split
from fastirt.errors import UserError, first_line
from fastirt.export.proof import MIN_COSINE, SAMPLE, sample_pixels
from fastirt.export.source import Source
from fastirt.images.decoders.pil import decode
from fastirt.model.encoder import normalization_constants
from fastirt.model.save import description
from fastirt.model.weights.load import write_model
from fastirt.model.weights.timm_line import loading_line, timm_call

# With timm's own transform, whose resize is that of the installed Pillow: Pillow 13 resizes columns
# first where that is less work, which gives tall images other levels.
MIN_TRANSFORM_COSINE, MIN_TRANSFORM_MEAN = 0.99, 0.999
IMAGE = "image.jpg"  # in the lines of the card
KEPT = ("first_conv", "classifier", "pool_size")  # of the architecture, in timm's own configuration


class TimmCheck(NamedTuple):
    """What the lines of the card give, beside the run's encoder.

    Attributes:
        same_pixels: smallest cosine on the run's own pixels: weights and pooling.
        own_transform: smallest cosine of the lines as they stand, with timm's transform.
        mean: mean of those.
        images: number of test images.
    """

    same_pixels: float
    own_transform: float
    mean: float
    images: int


def write_timm_folder(source: Source, folder: Path) -> None:
    """config.json and model.safetensors. Raises UserError if timm cannot give the descriptors."""
    kwargs, _ = _call(source)
    encoder, config = source.encoder, source.config
    own = encoder.vit.pretrained_cfg
    crop_pct, crop_mode = eval_crop(config.input.input_size, config.input.resize_size, config.input.resize)
    mean, std = normalization_constants(config, encoder)
    pretrained = {
        "tag": re.sub(r"[^0-9A-Za-z_]+", "_", source.name).strip("_") or "fastirt",
        "custom_load": False,
        "input_size": [3, config.input.input_size, config.input.input_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        **{name: own.get(name) for name in KEPT},
    }
    tree = {
        "architecture": config.model.model.split(".")[0],
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": kwargs.get("global_pool", getattr(encoder.vit, "global_pool", "token")),
        "model_args": {name: value for name, value in kwargs.items() if name != "num_classes"},
        "pretrained_cfg": pretrained,
    }
    # No path of this machine: the folder is made to be copied.
    name = Path("model.safetensors")
    line = loading_line(encoder, name)
    write_model(encoder.vit.state_dict(), folder / name, description(config), line)
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def eval_crop(size: int, resized: int, resize: str) -> tuple[float, str]:
    """(crop_pct, crop_mode) with which timm resizes to `resized` and crops `size` pixels."""
    share = size / resized
    while math.floor(size / share) < resized:  # timm rounds down
        share = math.nextafter(share, 0)
    return share, "squash" if resize == "square" else "center"


def timm_lines(source: Source, place: str) -> list[str]:
    """Python that gives `z`, the (1, D) descriptor of IMAGE, in plain timm.

    place: of the model, such as `local-dir:OUT`.
    """
    _, descriptor = _call(source)
    upright = source.config.input.orientation == "exif"
    return [
        "import timm, torch, PIL.Image, PIL.ImageOps" if upright else "import timm, torch, PIL.Image",
        f"model = timm.create_model({json.dumps(place)}, pretrained=True, num_classes=0).eval().requires_grad_(False)",
        "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
        f"x = transform({opened_image(source, IMAGE)}).unsqueeze(0)",
        f"z = torch.nn.functional.normalize({descriptor}, dim=1)",
    ]


def opened_image(source: Source, file: str) -> str:
    """The expression that decodes a file as the run does, for 8-bit images."""
    opened = f'PIL.Image.open("{file}")'
    upright = f"PIL.ImageOps.exif_transpose({opened})" if source.config.input.orientation == "exif" else opened
    return f'{upright}.convert("RGB")'


def plain_call(source: Source) -> Optional[str]:
    """The expression of `model` and `x` for the descriptor where it is not `model(x)`."""
    _, descriptor = _call(source)
    return None if descriptor == "model(x)" else descriptor


def check_timm_folder(source: Source, folder: Path) -> TimmCheck:
    """Run the lines of the card on test images. Raises UserError if they give other descriptors."""
    lines = timm_lines(source, f"local-dir:{folder}")
    split = source.evaluated()[0]
    pixels, rows = sample_pixels(source, split, SAMPLE)
    names: dict[str, Any] = {}
    with torch.inference_mode():
        expected = torch.cat([source.encoder(part.to(source.device)).cpu() for part in _parts(pixels)])
        try:
            exec("\n".join(lines[:3]), names)  # only text of this file
            same = []
            for part, z in zip(_parts(pixels), expected.split(32)):
                exec(lines[4], names | {"x": part}, given := {})
                same.append((given["z"] * z).sum(1))
            found = [(_of_image(source, split, int(row), lines, names), row, z) for row, z in zip(rows, expected)]
        except Exception as error:  # timm raises many types
            raise UserError(f"--timm: timm cannot load the folder: {first_line(error)}") from error
    cosines = {split.paths[row]: float(descriptor @ z) for descriptor, row, z in found if descriptor is not None}
    worst = min(cosines, key=cosines.__getitem__) if cosines else ""
    own = [*cosines.values()] or [1.0]
    check = TimmCheck(min(1.0, float(torch.cat(same).min())), min(1.0, *own), sum(own) / len(own), len(cosines))
    for value, least, what in (
        (check.same_pixels, MIN_COSINE, "on the run's own pixels"),
        (
            check.own_transform,
            MIN_TRANSFORM_COSINE,
            f"with timm's transform, for {worst}",
        ),
    ):
        if not value >= least:
            raise UserError(f"--timm: cosine {value:.6f} {what}: less than {least}: leave --timm out, use --onnx")
    return check


def _call(source: Source) -> tuple[dict[str, Any], str]:
    found = timm_call(source.encoder)
    if found is None:
        model = source.config.model
        raise UserError(
            f"--timm: timm has no arguments of {model.model} for --pooling {model.pooling} that give this run's "
            "descriptors: leave --timm out, use --onnx"
        )
    return found


def _parts(pixels: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(pixels).split(32))


def _of_image(
    source: Source, split: Split, row: int, lines: list[str], names: dict[str, Any]
) -> Optional[torch.Tensor]:
    """The descriptor (D,) that the lines give for the file of an image; None above 8 bits, where
    Pillow's `convert` clips and the run scales.
    """
    file = Path(split.paths[row])
    with tempfile.TemporaryDirectory() as folder:
        if source.packed is not None:  # the files may be elsewhere
            file = Path(folder) / "image.png"
            decode(source.images(split).read(row), source.config.input.orientation).save(file)
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                return None
        found = dict(names)
        exec("\n".join(lines[3:]).replace(f'"{IMAGE}"', repr(str(file))), found)
    return found["z"][0]
