"""What a step does outside the graphs of torch.compile: eager operators, the project's kernels."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.predict.categories import eager_category, own_category
from fastirt.kernels import gather, operators
from fastirt.kernels.checks import resolve_precision
from fastirt.kernels.passes import launch
from fastirt.kernels.rounding import product_operand
from fastirt.step.train_step import TrainStep

OWN_KERNELS = ("stats_kernel", "rows_kernel", "totals_kernel", "grad_kernel", "combine_kernel")
# torch's multi_tensor_apply: elements a block, blocks a kernel, tensors a kernel by number of lists
CHUNK, BLOCKS, TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


class EagerOperators(TorchDispatchMode):
    """Records, in `kernels`, the operators that run while it is active and not `paused`."""

    paused = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # torch.compile skips every frame under any other mode

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not EagerOperators.paused:
            kernel = kernel_of(func, args, kwargs or {}, out)
            if kernel["launches"]:
                self.kernels.append(kernel)
        return out


def kernel_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> dict[str, Any]:
    """One operator's launches and bytes read and written. Views and allocations launch nothing."""
    name = str(func)
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    storages = {id(t.untyped_storage()) for t in tensors}
    fresh = [a for a in tree_leaves(out) if isinstance(a, Tensor) and id(a.untyped_storage()) not in storages]
    writes = [a for a, s in zip(args, func._schema.arguments) if s.alias_info is not None and s.alias_info.is_write]
    written = [t for t in tree_leaves(writes) if isinstance(t, Tensor)]
    if (not written and not fresh) or "empty" in name:
        return dict(launches=0)
    launches = _launches_of_lists(name, args, bool(fresh)) if "_foreach" in name or "_fused_" in name else 1
    if name.startswith(("aten.index.", "aten.index_put_.")):  # the rows, not the table
        tensors, written = tensors[1:], tensors[-1:]
    if "_fused_adam" in name:  # gradients are written only with a gradient scale
        written = written[: len(written) * 3 // 4]
    if "copy_" in name:  # what is overwritten is not read
        tensors = [t for t in tensors if not any(t is w for w in written)]
    moved = sum(t.numel() * t.element_size() for t in (*tensors, *fresh, *written))
    category = eager_category(name, len(tensors), moved)
    return dict(phase="eager", category=category, name=name, launches=launches, bytes=moved, flops=0)


def _launches_of_lists(name: str, args: tuple, fresh: bool) -> int:
    """Kernels of an operator on lists of tensors, as torch's multi_tensor_apply splits them."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    depth = len({id(a) for a in lists}) + ("_foreach" in name and fresh)
    most = TENSORS[min(5, max(1, depth))]
    launches, blocks, held = 1, 0, 0
    for tensor in lists[0]:
        held += 1
        for _ in range(math.ceil(tensor.numel() / CHUNK)):
            blocks += 1
            if blocks == BLOCKS:
                launches, blocks, held = launches + 1, 0, 1
        if held == most:
            launches, blocks, held = launches + 1, 0, 0
    return launches


class RecordedKernel:
    """Stands in for a Triton kernel: keeps the tensors of each launch, by argument."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[dict[str, Tensor]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            arguments = {**dict(zip(self.kernel.arg_names, args)), **options}
            self.calls.append({name: value for name, value in arguments.items() if isinstance(value, Tensor)})

        return launch


@contextlib.contextmanager
def recorded_gather() -> Iterator[RecordedKernel]:
    """Within it, the kernel that makes the step's images is recorded."""
    recorded = RecordedKernel(gather.gather_kernel)
    with mock.patch.object(gather, "gather_kernel", recorded):
        yield recorded


def own_kernels(step: TrainStep, batch_size: int, gathered: RecordedKernel) -> list[dict[str, Any]]:
    """The project's kernels of one step: its loss, forward and backward, and the gather."""
    recorded = {name: RecordedKernel(getattr(launch, name)) for name in OWN_KERNELS}
    z = torch.empty(batch_size, step.encoder.embed_dim, device=step.device)
    labels = torch.empty(batch_size, dtype=torch.int64, device=step.device)
    memory: Any = step.memory
    objective: Any = step.forward_pass.objective
    slots = None if step.networks.momentum_encoder is not None else labels
    precision = resolve_precision(objective.precision, z, memory.embeddings)
    inputs = (z, product_operand(z, precision), labels, memory.embeddings, memory.labels, slots)
    options = (objective.margin, objective.contrastive, 1e-8, 1e-6, precision, objective.finite_slots)
    with contextlib.ExitStack() as stack:
        for name, kernel in recorded.items():
            stack.enter_context(mock.patch.object(launch, name, kernel))
        result = operators.contrastive_koleo._init_fn(*inputs, *options)
        operators.contrastive_koleo_backward._init_fn(*result[:3], *inputs, *result[3:], *options)
    recorded["gather_kernel"] = gathered
    kernels = []
    for name, kernel in recorded.items():
        for tensors in kernel.calls:
            moved = sum(t.numel() * t.element_size() for t in tensors.values())
            if kernel is gathered:  # a byte read for each element written
                moved = tensors["out_ptr"].numel() * (1 + tensors["out_ptr"].element_size())
            category = own_category(name)
            kernels.append(dict(phase="own", category=category, name=name, launches=1, bytes=moved, flops=0))
    return kernels
