"""python -m benchmarks.predict.record "+ CUDA graph" --out benchmarks/predict/kernels

Writes the list of kernels of one row of `benchmarks step`, without a GPU: the step runs on fake
CUDA tensors, and TorchInductor generates the code that it would run on an H200. The code is read,
never run. 20 to 40 seconds on one core that is otherwise idle.
"""

from __future__ import annotations

import os
import tempfile

# Before any import of torch or triton.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if __name__ == "__main__":  # Inductor leaves folders behind where it is stopped
    SCRATCH = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = SCRATCH.name

from benchmarks.predict import fake_cuda

if __name__ == "__main__":
    fake_cuda.install()

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch._inductor.config as inductor_config
from torch._inductor import compile_fx
from torch._inductor import graph as inductor_graph
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.parts.step import contenders
from benchmarks.predict import kernel_list
from benchmarks.predict.generated import kernels_of_graph
from benchmarks.predict.operators import EagerOperators, own_kernels, record_gather
from fastirt.config.options import Config
from fastirt.loading.batch import Batch, ImageViews
from fastirt.model.build import build_encoder
from fastirt.step.train_step import build_train_step

DEVICE = torch.device("cuda:0")
OPTIONS = dict(
    compile_threads=1,
    joint_graph_constant_folding=False,  # it computes on real tensors
    force_disable_caches=True,
    benchmark_kernel=True,  # writes the bytes of each kernel into its code
)


class Generated(Exception):
    """(code, nodes) of one graph: stops Inductor before it compiles the code."""


def stop_at_code(self: inductor_graph.GraphLowering) -> None:
    """In place of GraphLowering.compile_to_module."""
    code, _ = self.codegen_with_cpp_wrapper() if self.cpp_wrapper else self.codegen()
    raise Generated(code.value, [describe(node) for node in self.scheduler.nodes])


def describe(node: Any) -> dict[str, Any]:
    """What `kernels_of_graph` needs of one scheduled node."""
    inner = getattr(node, "node", None)
    kernel = getattr(inner, "python_kernel_name", None) or getattr(inner, "op_overload", None)
    try:
        flops = node.estimate_flops()
    except Exception:  # Inductor has no count for this operator
        flops = None
    return dict(
        kernel=str(kernel) if kernel else None, bytes=node.get_read_write_buffers_sizes(), flops=flops,
        inputs=_shapes(getattr(inner, "inputs", None) or []), outputs=_shapes([b.node for b in node.get_outputs()]),
    )  # fmt: skip


def _shapes(buffers: list[Any]) -> list[list[int]]:
    sizes = [buffer.maybe_get_size() for buffer in buffers if hasattr(buffer, "maybe_get_size")]
    return [[int(side) for side in size] for size in sizes if size is not None]


def fake_run(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """Runs a graph on fake tensors, in place of its generated code."""

    def run(inputs: list[Any]) -> Any:
        EagerOperators.paused = True
        try:
            with torch.no_grad():
                return torch.fx.Interpreter(graph).boxed_run(list(inputs))
        finally:
            EagerOperators.paused = False

    boxed: Any = run
    boxed._boxed_call = True  # AOTAutograd passes the inputs as one list
    return boxed


class Recorder:
    """Takes the place of Inductor's compiler; `kernels` are those of all graphs so far."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []
        self.graphs = 0
        inductor: Any = compile_fx
        self._compile_graph, self._compile = inductor.compile_fx_inner, inductor.compile_fx
        graph: Any = inductor_graph.GraphLowering
        graph.compile_to_module = stop_at_code
        inductor.compile_fx = self.compile
        for name, value in OPTIONS.items():
            setattr(inductor_config, name, value)

    def compile(self, model: Any, example_inputs: Any, inner_compile: Any = None, **kwargs: Any) -> Any:
        return self._compile(model, example_inputs, inner_compile=inner_compile or self.compile_graph, **kwargs)

    def compile_graph(self, graph: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        """Keep the kernels of one graph. What is returned runs the graph on fake tensors."""
        saved = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))  # Inductor changes the graph
        backward = bool(kwargs.get("is_backward"))
        phase = f"{'backward' if backward else 'forward'} {self.graphs}"
        try:
            self._compile_graph(graph, example_inputs, **kwargs)
        except Exception as error:
            code, nodes = _generated(error).args
            self.kernels += kernels_of_graph(code, nodes, phase, backward)
        self.graphs += 1
        print(f"graph {phase}: {len(self.kernels)} kernels so far", file=sys.stderr, flush=True)

        return fake_run(saved)


def _generated(error: BaseException) -> Generated:
    """The `Generated` that Inductor's error wraps; raises any other error."""
    found: BaseException | None = error
    while found is not None:
        for candidate in (found, getattr(found, "inner_exception", None)):
            if isinstance(candidate, Generated):
                return candidate
        found = found.__cause__
    raise error


def fake_parameters(encoder: torch.nn.Module) -> None:
    """Replace real parameters and buffers, which timm needs to build the model, by fake ones."""
    for module in encoder.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in list(tensors.items()):
                if value is not None:
                    fake: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                    is_parameter = isinstance(value, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(fake, value.requires_grad) if is_parameter else fake


def record(row: str, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels of one step. Raises ValueError for an unknown row or one without compiler."""
    changes = dict(contenders(DEVICE).get(row) or {})
    if changes.get("engine", "eager") == "eager":
        raise ValueError(f"{row!r}: not a compiled row of `python -m benchmarks step`")
    transform, options = changes.pop("transform", None), changes.pop("inductor", {})
    config = Config().replace(
        weights="scratch", max_iter=10**6, batch_size=sizes["batch_size"], model=sizes["model"], memory_ratio=1.0,
        **changes,
    )  # fmt: skip
    recorder, gathered = Recorder(), record_gather()
    encoder = build_encoder(config.model, sizes["input_size"])
    if transform is not None:
        transform(encoder)
    with FakeTensorMode():
        fake_parameters(encoder)
        step = build_train_step(encoder, config, sizes["slots"], DEVICE, compile_options=options)
        if "max_grad_norm" in step.optimizer.defaults:  # as the part `step` has it
            step.optimizer.defaults["max_grad_norm"] = None
        engine: Any = step.engine
        engine.run = lambda body: body()  # what a CUDA graph holds, not its capture
        step(_batch(sizes, 0))  # compiles
        gathered.calls.clear()
        with EagerOperators() as eager:
            step(_batch(sizes, 1))
        return recorder.kernels + eager.kernels + own_kernels(step, sizes["batch_size"], gathered)


def _batch(sizes: dict[str, Any], number: int) -> Batch:
    count, side = sizes["batch_size"], sizes["input_size"]
    images = torch.empty(count, side, side, 3, dtype=torch.uint8, device=DEVICE)
    labels = torch.empty(count, dtype=torch.int64, device=DEVICE)
    return Batch(ImageViews.whole(images), labels, np.arange(count), number, count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict.record", description=__doc__)
    parser.add_argument("row", help="a compiled row of `python -m benchmarks step`, e.g. '+ CUDA graph'")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--slots", type=int, default=59551, help="of the memory")
    parser.add_argument("--out", type=Path, default=kernel_list.FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("model", "input_size", "batch_size", "slots")}
    path = kernel_list.write(args.out, args.row, sizes, record(args.row, sizes), torch.__version__)
    print(f"wrote {path}", flush=True)
    sys.stderr.flush()
    SCRATCH.cleanup()
    os._exit(0)  # an orderly exit ends in a segmentation fault: C++ hooks were replaced


if __name__ == "__main__":
    main()
