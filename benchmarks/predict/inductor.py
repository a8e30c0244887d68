"""The code that TorchInductor generates for a GPU that is not here: it is kept, never run."""

from __future__ import annotations

import contextlib
import copy
import sys
from dataclasses import dataclass
from typing import Any, Callable, Iterator
from unittest import mock

import torch
import torch._inductor.config as inductor_config
from torch._inductor import compile_fx
from torch._inductor import graph as inductor_graph

from benchmarks.predict.generated import kernels_of_graph
from benchmarks.predict.operators import EagerOperators

OPTIONS = dict(
    compile_threads=1,
    joint_graph_constant_folding=False,  # it computes on real tensors
    force_disable_caches=True,
    benchmark_kernel=True,  # writes the bytes of each kernel into its code
)


@dataclass(frozen=True)
class Graph:
    """One graph of a step. code: a Python module; nodes: what `kernels_of_graph` needs of it."""

    phase: str
    is_backward: bool
    code: str
    nodes: list[dict[str, Any]]

    def kernels(self) -> list[dict[str, Any]]:
        return kernels_of_graph(self.code, self.nodes, self.phase, self.is_backward)


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


@contextlib.contextmanager
def recorded_code() -> Iterator[list[Graph]]:
    """Within it, torch.compile generates code, which is added to the list that this yields.

    A call of what was compiled runs the graph itself, on fake tensors.
    """
    graphs: list[Graph] = []
    inductor: Any = compile_fx
    compile, compile_graph = inductor.compile_fx, inductor.compile_fx_inner

    def keep(graph: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        saved = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))  # Inductor changes the graph
        is_backward = bool(kwargs.get("is_backward"))
        phase = f"{'backward' if is_backward else 'forward'} {len(graphs)}"
        print(f"generating the code of graph {phase}", file=sys.stderr, flush=True)
        try:
            compile_graph(graph, example_inputs, **kwargs)
        except Exception as error:
            graphs.append(Graph(phase, is_backward, *_generated(error).args))
        return fake_run(saved)

    def compile_with(model: Any, example_inputs: Any, inner_compile: Any = None, **kwargs: Any) -> Any:
        return compile(model, example_inputs, inner_compile=inner_compile or keep, **kwargs)

    with (
        mock.patch.object(inductor, "compile_fx", compile_with),
        mock.patch.object(inductor_graph.GraphLowering, "compile_to_module", stop_at_code),
        inductor_config.patch(OPTIONS),
    ):
        yield graphs


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


def _generated(error: BaseException) -> Generated:
    """The `Generated` that Inductor's error wraps; raises any other error."""
    found: BaseException | None = error
    while found is not None:
        for candidate in (found, getattr(found, "inner_exception", None)):
            if isinstance(candidate, Generated):
                return candidate
        found = found.__cause__
    raise error
