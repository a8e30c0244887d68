"""TorchInductor's code of a step: `python -m tests.fake_cuda.run generated_proof [CASE ...]`.

Each case is a row of `benchmarks step` at DeiT-S, 224 pixels and batch 64, made by the generator of
`benchmarks predict`. The planted cases must be reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.predict import kernel_list
from benchmarks.predict.inductor import Graph
from benchmarks.predict.record import record
from fastirt.images import normalize
from fastirt.model.encoder import Encoder
from tests.fake_cuda.generated_code import copied_inputs, layout_copies, sources, unexpected_operators
from tests.fake_cuda.generated_kernels import distinct, spilling

SIZES = {"model": "deit_small_patch16_224", "input_size": 224, "batch_size": 64, "slots": 59551}
BLOCKS = 12  # of the encoder
# Kernels that only change a layout, by a part of their name: what each is, and its launches.
KNOWN_COPIES = {
    "_clone_permute_stack_": ("dq, dk and dv of a block, stacked for the backward of its qkv layer", BLOCKS),
    "_slice_transpose_view_": ("the gradient of the patches, without the class token's", 1),
}

_forward = Encoder.forward


def _nchw(self: Encoder, images: Tensor) -> Tensor:
    return _forward(self, images.contiguous())


@dataclass(frozen=True)
class Case:
    """row: of `benchmarks step`; compile: a part of the names of the kernels to compile."""

    row: str
    compile: str = ""
    inductor: dict[str, Any] = field(default_factory=dict)
    plant: Any = contextlib.nullcontext()


CASES = {
    "default": Case("+ CUDA graph"),
    "bf16 weights": Case("graph, bf16 weights"),
    "momentum encoder": Case("graph, momentum twin"),
    "planted: NCHW images": Case("+ CUDA graph", "_clone_", plant=mock.patch.object(Encoder, "forward", _nchw)),
    "planted: combined kernels": Case("graph, bf16 weights", "triton_red_fused", {"combo_kernels": True}),
}


def prove(case: Case) -> list[str]:
    """What is wrong with the code of a step."""
    # They hold tensors of an earlier case's mode.
    normalize.byte_table.cache_clear(), normalize.whole_views.cache_clear()
    torch._dynamo.reset()
    with case.plant:
        graphs, kernels = record(case.row, SIZES, **case.inductor)
    faults = _check_list(case.row, kernels)
    for graph in graphs:
        found = unexpected_operators(graph.code) + copied_inputs(graph.code)
        faults += [f"{graph.phase}: {fault}" for fault in found]
    faults += _check_copies(graphs)
    every = [pair for graph in graphs for pair in sources(graph.code).items() if case.compile in pair[0]]
    return faults + spilling(distinct(every))


def _check_list(row: str, kernels: list[dict[str, Any]]) -> list[str]:
    """The list of kernels is the committed one, so its launches are those that are capped there."""
    committed = kernel_list.find(row, SIZES)
    with tempfile.TemporaryDirectory() as folder:
        path = kernel_list.write(Path(folder), row, SIZES, kernels, torch.__version__)
        if committed["torch"] != torch.__version__ or path.read_text() == (kernel_list.FOLDER / path.name).read_text():
            return []
    launches = sum(kernel["launches"] for kernel in kernels)
    before = sum(kernel["launches"] * kernel["count"] for kernel in committed["kernels"])
    return [f"{launches} launches, {before} in {path.name}: make the list again if that is meant"]


def _check_copies(graphs: list[Graph]) -> list[str]:
    faults = []
    for graph in graphs:
        for name, count in layout_copies(graph.code).items():
            known = [most for part, (_, most) in KNOWN_COPIES.items() if part in name and graph.is_backward]
            if known != [count]:
                faults.append(f"{graph.phase}: {name} only changes a layout, {count} times")
    return faults


def main(names: list[str]) -> None:
    """Print one JSON line for each case: its name and its faults."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))  # else below the next
    with tempfile.TemporaryDirectory() as scratch:  # Inductor leaves folders behind where it is stopped
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        for name in names or CASES:
            print(json.dumps([name, prove(CASES[name])]), flush=True)
            print(f"{name}: {sum(os.times()[:4]):.0f} CPU seconds so far", file=sys.stderr, flush=True)
