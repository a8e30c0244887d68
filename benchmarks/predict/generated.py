"""From the code that TorchInductor generates for one graph to the kernels that it launches."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from benchmarks.predict.categories import (
    ATTENTION,
    ATTENTION_BACKWARD,
    FP8_PRODUCTS,
    NORM_GRADIENTS,
    PATCHES,
    PRODUCTS,
    extern_category,
    triton_category,
)

Kernel = dict[str, Any]  # a row of a kernel list: see `kernel_list.read`
TRITON = re.compile(r"(triton_\w+)\.run\(")
EXTERN = re.compile(r"extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(")
WORKSPACE_SUM = re.compile(r"\.view\((\d+), (\d+)\)\.sum\(dim=0")  # ends a mix-order reduction
SKIPPED = ("#", "assert_", "def ", "async_compile", "benchmark", "aten")


def kernels_of_graph(code: str, nodes: list[dict[str, Any]], phase: str, backward: bool) -> list[Kernel]:
    """The kernels that `code` launches, in order.

    nodes: Inductor's scheduled nodes, as `record.describe` gives them: bytes and operations of
        kernels that are not Triton's.
    Raises ValueError where code and nodes do not fit together.
    """
    sizes = _bytes_of_triton_kernels(code)
    externs = [node for node in nodes if node["kernel"]]
    kernels: list[Kernel] = []
    for line in _call(code):
        if line.startswith(SKIPPED):
            continue
        if launched := TRITON.match(line):
            name = launched.group(1)
            category = triton_category(name, backward)
            kernels.append(dict(phase=phase, category=category, name=name, launches=1, bytes=sizes[name], flops=0))
        elif summed := WORKSPACE_SUM.search(line):
            moved = 4 * int(summed.group(1)) * int(summed.group(2))
            kernels.append(
                dict(phase=phase, category=NORM_GRADIENTS, name="sum of a workspace", launches=1, bytes=moved, flops=0)
            )
        elif EXTERN.search(line):
            if not externs:
                raise ValueError(f"{phase}: no scheduled node for: {line}")
            kernels += _extern(externs.pop(0), phase)
    if externs:
        raise ValueError(f"{phase}: {len(externs)} scheduled kernels are not in the generated code")
    _share_unknown_bytes(kernels, nodes)
    return kernels


def _call(code: str) -> list[str]:
    """The lines of the function that launches the kernels."""
    marker = "def call(self, args)" if "def call(self, args)" in code else "\ndef call(args)"
    return [line.strip() for line in code[code.rindex(marker) :].splitlines()]


def _bytes_of_triton_kernels(code: str) -> dict[str, float | None]:
    """By name, what Inductor says that each kernel moves; None for some combined kernels."""
    found: dict[str, float | None] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "triton":
            name, source, *_ = (getattr(argument, "value", None) for argument in node.args)
            said = re.search(r"(?:'kernel_num_gb': |num_gb = )([\d.e-]+)", str(source))
            found[str(name)] = float(said.group(1)) * 1e9 if said else None
    return found


def _extern(node: dict[str, Any], phase: str) -> list[Kernel]:
    name = node["kernel"].replace("torch.ops.aten.", "").removeprefix("aten.")
    if "contrastive_koleo" in name:  # the project's kernels are recorded where they are launched
        return []
    category = extern_category(name)
    launches, flops = 1, node["flops"] or 0.0
    if category == ATTENTION_BACKWARD:
        # Also the dot product of dO and O with the zeroed dQ, and the cast of dQ.
        launches, flops = 3, 2.5 * _attention_flops(node)
    elif category == ATTENTION:
        flops = _attention_flops(node)
    elif category == PATCHES:
        flops = _convolution_flops(node)
    elif category in (PRODUCTS, FP8_PRODUCTS) and not flops:  # Inductor does not count all products
        flops = 2.0 * math.prod(node["outputs"][0]) * node["inputs"][0][-1]
    return [dict(phase=phase, category=category, name=name, launches=launches, bytes=node["bytes"], flops=flops)]


def _attention_flops(node: dict[str, Any]) -> float:
    """Of the forward: two products of (tokens, tokens) a head, from the first input's shape."""
    batch, heads, tokens, width = next(shape for shape in node["inputs"] if len(shape) == 4)
    return 4.0 * batch * heads * tokens**2 * width


def _convolution_flops(node: dict[str, Any]) -> float:
    """Of the forward, or of the weight's gradient: images have none."""
    shapes = [shape for shape in node["inputs"] if len(shape) == 4]
    weight = shapes[2] if "backward" in node["kernel"] else shapes[1]
    result = shapes[0] if "backward" in node["kernel"] else node["outputs"][0]
    return 2.0 * math.prod(result) * math.prod(weight[1:])


def _share_unknown_bytes(kernels: list[Kernel], nodes: list[dict[str, Any]]) -> None:
    """Give kernels of unknown size equal shares of what the graph moves beyond the others."""
    unknown = [kernel for kernel in kernels if kernel["bytes"] is None]
    if unknown:
        known = sum(kernel["bytes"] or 0 for kernel in kernels)
        total = sum(node["bytes"] for node in nodes if "contrastive" not in str(node["kernel"]))
        for kernel in unknown:
            kernel["bytes"] = max(0.0, total - known) / len(unknown)
