"""The preprocessing of a run's evaluation as an ONNX graph: any image to the encoder's input.

The resize is two matrix products with bicubic weights that the graph computes from the size of the
image: the antialiased filter of torch and Pillow, whatever the Resize of a runtime does. Weights
are rounded as torch rounds them for uint8: without that, cosines with the run's vectors fall to
0.99998. The center crop costs nothing: only the weights of its rows and columns are made.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastirt.config.options import InputConfig
from fastirt.export.options import IMAGES, PIXELS

INT16_BITS = 22  # that torch gives the fraction of a weight at most
CUBIC = -0.5  # the free parameter of the bicubic filter in Pillow, and in torch with antialias


def preprocessing_model(
    input: InputConfig, mean: Sequence[float], std: Sequence[float], opset: int, ir_version: int
) -> onnx.ModelProto:
    """The graph from `images`, uint8 (N, H, W, 3), to `pixels`, float (N, 3, S, S).

    Args:
        input: resize and crop.
        mean: per channel, of images in [0, 1].
        std: likewise.
        opset: version of ONNX's operators, as of the graph that it is joined to.
        ir_version: likewise, of the file format.
    """
    size = input.input_size
    graph = _Graph()
    height, width = (graph.add("Shape", IMAGES, start=axis, end=axis + 1) for axis in (1, 2))
    channels_first = graph.add("Cast", graph.add("Transpose", IMAGES, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)

    tall, wide = _resized(graph, height, width, input)
    # Rows first, then columns, and whole levels between them, as torch does it for uint8.
    rows = graph.add("MatMul", channels_first, _weights(graph, width, wide, size, transposed=True))
    columns = graph.add("MatMul", _weights(graph, height, tall, size, transposed=False), _levels(graph, rows))
    scale = np.array([1 / (255 * s) for s in std], np.float32).reshape(3, 1, 1)
    shift = np.array([-m / s for m, s in zip(mean, std)], np.float32).reshape(3, 1, 1)
    scaled = graph.add("Mul", _levels(graph, columns), graph.constant(scale))
    graph.add("Add", scaled, graph.constant(shift), output=PIXELS)

    images = helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["batch", "height", "width", 3])
    pixels = helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, ["batch", 3, size, size])
    made = helper.make_graph(graph.nodes, "preprocessing", [images], [pixels], graph.constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


class _Graph:
    """Nodes and constants of a graph; an output is named after its operator."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"resize_{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, value: np.ndarray) -> str:
        name = f"resize_constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def floats(self, *values: float) -> str:
        return self.constant(np.array(values, np.float32))


def _resized(graph: _Graph, height: str, width: str, input: InputConfig) -> tuple[str, str]:
    """(height, width) after the resize, as `resize_crop.resized_size` gives it."""
    side = graph.ints(input.resize_size)
    if input.resize == "square":
        return side, side
    narrow = graph.add("LessOrEqual", width, height)
    longer = graph.add("Div", graph.add("Mul", side, graph.add("Max", height, width)), graph.add("Min", height, width))
    return graph.add("Where", narrow, longer, side), graph.add("Where", narrow, side, longer)


def _weights(graph: _Graph, length: str, resized: str, size: int, transposed: bool) -> str:
    """(size, length): weights of an axis's pixels in those of the crop; or transposed."""
    margin = graph.add("Cast", graph.add("Sub", resized, graph.ints(size)), to=TensorProto.FLOAT)
    # Round takes halves to the even number, as Python's does in `crop_offset`.
    first = graph.add("Cast", graph.add("Round", graph.add("Mul", margin, graph.floats(0.5))), to=TensorProto.INT64)
    rows = graph.constant(np.arange(size)[:, None])
    # The largest weight is at the edge or at any pixel of half of the axis: weights are symmetric.
    largest = graph.add("ReduceMax", _filter(graph, rows, length, resized), keepdims=0)
    weights = _filter(graph, graph.add("Add", rows, first), length, resized)
    rounded = _rounded_as_int16(graph, weights, largest)
    return graph.add("Transpose", rounded, perm=[1, 0]) if transposed else rounded


def _filter(graph: _Graph, made: str, length: str, resized: str) -> str:
    """(rows, length): the pixels `made`, (rows, 1) int64, of an axis that is resized.

    Pixel i of the resized axis has its center at (i + 1/2) · length / resized.
    """
    two = graph.ints(2)
    zero, one = graph.constant(np.array(0)), graph.constant(np.array(1))
    read = graph.add("Range", zero, graph.add("Squeeze", length), one)  # (length,)
    # Distances in integers, which stay exact for large images.
    odd_read, odd_made = (graph.add("Add", graph.add("Mul", i, two), graph.ints(1)) for i in (read, made))
    apart = graph.add("Sub", graph.add("Mul", odd_read, resized), graph.add("Mul", odd_made, length))
    step = graph.add("Mul", graph.add("Max", length, resized), two)
    distance, unit = (graph.add("Cast", i, to=TensorProto.FLOAT) for i in (graph.add("Abs", apart), step))
    cubic = _cubic(graph, graph.add("Div", distance, unit))
    return graph.add("Div", cubic, graph.add("ReduceSum", cubic, graph.ints(1), keepdims=1))


def _rounded_as_int16(graph: _Graph, weights: str, largest: str) -> str:
    """Multiples of 2^-p, p the most bits (up to 22) with which the largest one fits in int16."""
    units = graph.constant(2.0 ** np.arange(1, INT16_BITS + 1, dtype=np.float32))
    half = graph.floats(0.5)
    scaled = graph.add("Floor", graph.add("Add", graph.add("Mul", largest, units), half))
    fits = graph.add("Cast", graph.add("Less", scaled, graph.floats(2**15)), to=TensorProto.INT64)
    bits = graph.add("ReduceSum", fits, graph.ints(0), keepdims=1)
    unit = graph.add("Gather", graph.constant(2.0 ** np.arange(INT16_BITS + 1, dtype=np.float32)), bits)
    steps = graph.add("Floor", graph.add("Add", graph.add("Mul", graph.add("Abs", weights), unit), half))
    return graph.add("Div", graph.add("Mul", graph.add("Sign", weights), steps), unit)


def _cubic(graph: _Graph, t: str) -> str:
    """The filter at distances t >= 0 in pixels; 0 from 2 on."""
    a = CUBIC
    t = graph.add("Min", t, graph.floats(2))
    near = _polynomial(graph, t, (a + 2, -(a + 3), 0, 1))
    far = _polynomial(graph, t, (a, -5 * a, 8 * a, -4 * a))
    return graph.add("Where", graph.add("Less", t, graph.floats(1)), near, far)


def _polynomial(graph: _Graph, t: str, coefficients: Sequence[float]) -> str:
    value = graph.floats(coefficients[0])
    for coefficient in coefficients[1:]:
        value = graph.add("Add", graph.add("Mul", value, t), graph.floats(coefficient))
    return value


def _levels(graph: _Graph, values: str) -> str:
    """Rounded to the 256 levels of a byte."""
    rounded = graph.add("Floor", graph.add("Add", values, graph.floats(0.5)))
    low, high = (graph.constant(np.array(level, np.float32)) for level in (0, 255))
    return graph.add("Clip", rounded, low, high)
