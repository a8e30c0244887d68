"""The encoder's graph in fp16, and in int8 by onnxruntime's quantizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np
import onnx

from fastirt.export.graphs import quiet
from fastirt.export.options import PIXELS

# The end of the graph: the length of a vector in fp16 would be rounded to three digits.
IN_FP32 = ("ReduceL2", "Clip", "Expand", "Div")
PRODUCTS = ["MatMul", "Gemm"]  # quantized where one factor is a weight; the rest stays in fp32
CALIBRATION_BATCH = 8


def half(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and operators in fp16; inputs, outputs and the last norm in fp32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    last = [node.name for node in encoder.graph.node[-8:] if node.op_type in IN_FP32]
    with quiet("onnxruntime.transformers.float16"):
        return convert_float_to_float16(_copy(encoder), keep_io_types=True, node_block_list=last)


def int8(encoder: onnx.ModelProto, calibration: Optional[np.ndarray]) -> dict[str, onnx.ModelProto]:
    """The ways to quantize, by name: weights per channel, activations by image or by calibration.

    calibration: (N, 3, S, S) float32 training images as the encoder takes them; None: dynamic only.
    """
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def __init__(self, pixels: np.ndarray) -> None:
            self._batches: Iterator[np.ndarray] = iter(np.array_split(pixels, -(-len(pixels) // CALIBRATION_BATCH)))

        def get_next(self) -> Optional[dict[str, np.ndarray]]:
            batch = next(self._batches, None)
            return None if batch is None else {PIXELS: batch}

    shared: dict[str, Any] = {"op_types_to_quantize": PRODUCTS, "per_channel": True, "weight_type": ort.QuantType.QInt8}
    models = {}
    with tempfile.TemporaryDirectory() as folder, quiet(""):
        out = Path(folder) / "int8.onnx"
        ort.quantize_dynamic(_copy(encoder), out, **shared)
        models["dynamic"] = onnx.load(out)
        if calibration is not None:
            ort.quantize_static(
                _copy(encoder),
                out,
                Reader(calibration),
                quant_format=ort.QuantFormat.QDQ,
                activation_type=ort.QuantType.QUInt8,
                extra_options={"MatMulConstBOnly": True},
                **shared,
            )
            models["static"] = onnx.load(out)
    return models


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The converters change the model that they are given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
