"""`fastirt embed`: a model and images to a file of vectors."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fastirt.cli.parser import Command, Parser
from fastirt.config.flags import add_field, given
from fastirt.config.options import Config

DESCRIPTION = (
    "Embed images as the model's own evaluation does, into OUT.npy (with OUT.npy.csv and OUT.npy.json), "
    "OUT.safetensors or OUT.parquet. Unreadable images get a row of NaN and a mark. The same command goes on where "
    "one was killed; under torchrun the ranks share the work."
)
MODEL = "run folder, model file (.safetensors), or a timm model such as deit_small_patch16_224"
# Flags in place of the model's own options, by part of the configuration.
OPTIONS = {
    "input": ("input_size", "resize", "resize_size", "orientation", "normalization", "loader", "num_workers"),
    "model": ("model_kwargs", "pooling", "eval_descriptor", "precision"),
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model of a command that uses one: MODEL, and flags for `model_of`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--weights", metavar="FILE", help="of a timm model: weights in any format that train reads")
    parser.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a timm model: timm's weights, or random ones (default: timm's)",
    )
    parser.add_argument("--device", metavar="S", help="cuda, cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--engine",
        choices=("eager", "onednn"),
        default="eager",
        help="eager: to the last bit as evaluation does it; onednn: fp32 on a CPU up to rounding, 1.7 times as fast "
        "on AMD's with AVX-512 (default: eager)",
    )
    group = parser.add_argument_group("In place of the model's own options")
    for part, names in OPTIONS.items():
        for field in dataclasses.fields(getattr(Config(), part)):
            if field.name in names:
                add_field(group, "evaluate", part, field)


def model_of(args: dict[str, Any], device: str | None = None) -> Any:
    """The `fastirt.inference.model.Model` that the flags of `add_model` name."""
    from fastirt.inference.load import load

    names = {name for part in OPTIONS.values() for name in part}
    return load(
        args["model"],
        pretrained=args["pretrained"],
        weights=args["weights"],
        device=device or args["device"],
        engine=args["engine"],
        options=given({name: args[name] for name in names & args.keys()}),
    )


def _add_embed(commands: Any) -> Parser:
    embed = commands.add_parser(
        "embed", help="embed images into a file of vectors", description=DESCRIPTION, allow_abbrev=False
    )
    add_model(embed)
    embed.add_argument(
        "pictures",
        metavar="PICTURES",
        help="folder (and all below it), CSV file with a column path (others are kept), packed store, image, "
        "or - for a list on stdin",
    )
    embed.add_argument("out", metavar="OUT", type=Path, help="file to write: .npy, .safetensors or .parquet")
    embed.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the vectors (default: fp32)")
    embed.add_argument("--batch-size", metavar="N", type=int, default=128, help="images at a time (default: 128)")
    embed.add_argument(
        "--overwrite", action="store_true", help="replace OUT, and unfinished vectors of another model or list"
    )
    return embed


def _embed(args: dict[str, Any]) -> int:
    from fastirt.distributed.launch import as_rank

    return as_rank("embed", lambda ranks: _embed_as(ranks, args))


def _embed_as(ranks: Any, args: dict[str, Any]) -> int:
    from fastirt.distributed.device import choose_device
    from fastirt.inference.embed_files import embed_files, images_of
    from fastirt.inference.vector_files import check_out

    device = choose_device(args["device"], ranks)
    ranks.start(device)
    ranks.host.run_on_main(lambda: check_out(args["out"], args["overwrite"]))  # before the model is read
    embed_files(
        model_of(args, str(device)),
        images_of(args["pictures"], ranks),
        args["out"],
        dtype=args["dtype"],
        batch_size=args["batch_size"],
        overwrite=args["overwrite"],
        ranks=ranks,
    )
    return 0


COMMANDS = {"embed": Command(_add_embed, _embed)}
