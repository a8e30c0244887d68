"""`fastirt export`: a run as files for onnxruntime and plain timm."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fastirt.cli.parser import Command, Parser
from fastirt.config.flags import add_field, given
from fastirt.config.options import Config

EXPORT = (
    "Write a model as ONNX files and as a folder that plain timm loads, with a model card. Each file is checked on the "
    "data set's own test: cosine of every image with torch's vector, and Recall@1. Without --onnx and --timm: both."
)
DATA = (("data", ("dataset", "data_path", "packed")), ("run", ("device",)))


def _add_export(commands: Any) -> Parser:
    export = commands.add_parser(
        "export",
        help="write a model as ONNX and for plain timm, with proof",
        description=EXPORT,
        allow_abbrev=False,
        usage="fastirt export RUN OUT [--onnx] [--timm] [--fp16] [--int8] [--push USER/NAME] [options]",
    )
    export.add_argument("run", metavar="RUN", help="run folder, model file or timm model")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    flag: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    export.add_argument("--onnx", **flag, help="model.onnx: images in; encoder.onnx: normalized pixels in")
    export.add_argument("--timm", **flag, help="folder for timm.create_model('local-dir:OUT', pretrained=True)")
    export.add_argument("--fp16", **flag, help="both ONNX files also in fp16")
    export.add_argument("--int8", **flag, help="both ONNX files also in int8, the nearer of dynamic and static")
    export.add_argument("--push", **unset, metavar="USER/NAME", help="upload the folder to the Hugging Face Hub")
    export.add_argument(
        "--licence", "--license", **unset, metavar="NAME", help="of the model, for the card: apache-2.0"
    )
    export.add_argument("--overwrite", **flag, help="replace an earlier export")
    export.add_argument(
        "--max-difference",
        **unset,
        type=float,
        metavar="POINTS",
        help="by which Recall@1 of the fp32 file may differ from torch's (0.1); more fails the export",
    )
    export.add_argument(
        "--max-loss",
        **unset,
        type=float,
        metavar="POINTS",
        help="of Recall@1 that fp16 and int8 may lose; more fails the export (default: any)",
    )
    data = export.add_argument_group("Data set of the proof, if not the run's")
    for group, names in DATA:
        for field in dataclasses.fields(getattr(Config(), group)):
            if field.name in names:
                add_field(data, "evaluate", group, field)
    return export


def _export(args: dict[str, Any]) -> int:
    from fastirt.export.build import describe, export

    run, out = args.pop("run"), args.pop("out")
    print(describe(export(run, out, progress=True, **given(args)), out))
    return 0


COMMANDS = {"export": Command(_add_export, _export)}
