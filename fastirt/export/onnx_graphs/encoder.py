"""The encoder as an ONNX graph, with and without its preprocessing."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Iterator

import onnx
import onnx.compose
import torch
from torch import Tensor, nn

from fastirt.errors import UserError, first_line
from fastirt.export.onnx_graphs.preprocess import preprocessing_model
from fastirt.export.options import PIXELS, VECTORS
from fastirt.export.source import Source
from fastirt.model.encoder import Encoder, normalization_constants

LIMIT = 2 * 10**9  # bytes of weights: a file of protobuf ends at 2 GiB


def encoder_graph(encoder: Encoder) -> onnx.ModelProto:
    """From `pixels`, float (N, 3, S, S) as the run normalizes them, to `vectors`, float (N, D).

    Raises UserError for a model that torch cannot export, or that is too large for one file.
    """
    weights = sum(p.numel() * 4 for p in encoder.parameters())
    if weights > LIMIT:
        raise UserError(f"--onnx: {weights / 1e9:.1f} GB of weights: an ONNX file holds 2 GB: use --timm alone")
    size, device = encoder.input_size, next(encoder.parameters()).device
    example = torch.zeros(2, 3, size, size, device=device)
    try:
        with quiet("torch.onnx", "onnxscript", "onnx_ir"), _plain_attention(encoder):
            program = torch.onnx.export(
                _Float32(encoder).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[PIXELS],
                output_names=[VECTORS],
                verbose=False,
            )
            model = program.model_proto
    except Exception as error:  # torch.export raises many types
        reason = first_line(error.__cause__ or error)
        raise UserError(f"--onnx: {encoder.config.model}: torch cannot export it: {reason}") from error
    _strip(model)
    return model


def image_graph(encoder: onnx.ModelProto, source: Source) -> onnx.ModelProto:
    """From `images`, uint8 (N, H, W, 3) of any size, to `vectors`: first the preprocessing."""
    opset = next(opset.version for opset in encoder.opset_import if opset.domain in ("", "ai.onnx"))
    constants = normalization_constants(source.config, source.encoder)
    before = preprocessing_model(source.config.input, *constants, opset, encoder.ir_version)
    merged = onnx.compose.merge_models(before, encoder, io_map=[(PIXELS, PIXELS)])
    opsets = {entry.domain: entry for entry in merged.opset_import}
    del merged.opset_import[:]
    merged.opset_import.extend(opsets.values())  # each once: onnxruntime's quantizer refuses two
    return merged


def save(model: onnx.ModelProto, path: Path, source: Source) -> None:
    """Write a graph that says what it is of. Raises UserError."""
    from fastirt import __version__

    model.producer_name, model.producer_version = "fastirt", __version__
    model.doc_string = f"{source.config.model.model}, {source.config.describe_input()}; vectors of length 1"
    try:
        onnx.checker.check_model(model)
        onnx.save_model(model, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


class _Float32(nn.Module):
    """The encoder without autocast: its context is no operator."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)


@contextlib.contextmanager
def _plain_attention(encoder: Encoder) -> Iterator[None]:
    """Attention as products and softmax: torch 2.12 cannot export the fused one of BEiT."""
    modules = [module for module in encoder.modules() if getattr(module, "fused_attn", False)]
    for module in modules:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in modules:
            module.fused_attn = True


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes beside the graph: names of files of this machine among it."""
    parts = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output]
    for part in [*parts, *model.graph.value_info, *model.graph.initializer, *model.functions]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without the warnings of libraries and the info lines of the named loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
