"""The encoder's graph in fp16, and in int8 by onnxruntime's quantizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastirt.export.onnx_graphs.encoder import quiet
from fastirt.export.options import PIXELS, VECTORS

PRODUCTS = ["MatMul", "Gemm"]  # quantized where one factor is a weight; the rest stays in fp32
CALIBRATION_BATCH = 8


def half(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and operators in fp16; inputs, outputs and the norm of the vectors in fp32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = _copy(encoder)
    nodes, vectors = model.graph.node, model.graph.output[0]
    last = max(i for i, node in enumerate(nodes) if node.op_type == "ReduceL2")
    shape = [dim.dim_param or dim.dim_value for dim in vectors.type.tensor_type.shape.dim]
    descriptor = helper.make_tensor_value_info(nodes[last].input[0], TensorProto.FLOAT, shape)
    # The converter would round what flows between two operators in fp32: lengths would be 0.9997.
    del nodes[last:]
    del model.graph.output[:]
    model.graph.output.append(descriptor)
    with quiet("onnxruntime.transformers.float16"):
        model = convert_float_to_float16(model, keep_io_types=True)
    OnnxModel(model).topological_sort()  # its casts are at the end
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "norm_axis"))
    model.graph.node.append(helper.make_node("ReduceL2", [descriptor.name, "norm_axis"], ["norm"], keepdims=1))
    model.graph.node.append(helper.make_node("Div", [descriptor.name, "norm"], [VECTORS]))
    model.graph.output[0].CopyFrom(vectors)
    return model


def int8(encoder: onnx.ModelProto, calibration: Optional[np.ndarray]) -> dict[str, onnx.ModelProto]:
    """The ways to quantize, by name: weights per channel, activations by batch or by calibration.

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
