"""Checks what runs on fake CUDA tensors: every operator, custom operator and launch of a kernel."""

from __future__ import annotations

import collections
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import MockTensor

from benchmarks.fake_cuda.fake_tensors import address, is_locked, lock, tensors_of
from benchmarks.fake_cuda.streams import hide, tell, where

hide(__file__)
COPIES = ("aten._to_copy.default", "aten.copy_.default")
# FakeTensorMode lets operands of two dtypes pass here; CUDA refuses them.
PRODUCTS = {
    f"aten.{name}.default"
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    )
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Use it within a FakeTensorMode.

    Attributes:
        faults: what a GPU would refuse or wait for, each with file and line. Besides, operators
            whose result depends on values (`.item()`, boolean masks, `if tensor`) raise
            FakeTensorMode's own exceptions.
        uploads: copies from page-locked host memory, which do not wait, with file and line.
        products: dtypes of all matrix products and convolutions.
        count: how often each operator ran.
        read: storages read or written but not allocated here, by address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.uploads: list[str] = []
        self.products: collections.Counter = collections.Counter()
        self.count: collections.Counter = collections.Counter()
        self.read: dict[int, str] = {}
        self._made: dict[int, Tensor] = {}  # keeps its tensors: a freed address could be reused

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # torch.compile skips every frame under any other mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            # Operators that consist of others (linear, to) come here whole: look at their parts.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        is_pinned = bool(kwargs.get("pin_memory"))
        if is_pinned:  # needs CUDA's allocator
            kwargs = {**kwargs, "pin_memory": False}
        out = func(*args, **kwargs)
        name = str(func)
        if name == "prim.device.default":
            return out
        if is_pinned:
            lock(address(out), out)
        self.count[name] += 1
        given, made = tensors_of(args, kwargs), tensors_of(out)
        self._remember(given, made)
        if name in COPIES:
            self._check_copy(name, args, kwargs, out)
        else:
            self._check_devices(name, given)
        if name in PRODUCTS:
            self._check_dtypes(name, given)
        if func.namespace == "fastirt":
            self._check_operator(func, args, kwargs, out)
        return out

    def _remember(self, given: list[Tensor], made: list[Tensor]) -> None:
        for tensor in given:
            key = tensor.untyped_storage()._cdata
            if tensor.is_cuda and key not in self._made and key not in self.read:
                self.read[key] = f"{tuple(tensor.shape)} {tensor.dtype} at {where()}"
        for tensor in made:
            key = tensor.untyped_storage()._cdata
            if key not in self.read:
                self._made[key] = tensor

    def _check_copy(self, name: str, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        source = args[1] if name == "aten.copy_.default" else args[0]
        if source.device.type == out.device.type:
            return
        host = source if out.is_cuda else out
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        crossing = f"{source.device.type} to {out.device.type}, {tuple(out.shape)} {out.dtype}, at {where()}"
        if waits or not is_locked(host):
            self.faults.append(f"a copy that waits: {crossing}")
        else:
            self.uploads.append(crossing)

    def _check_devices(self, name: str, given: list[Tensor]) -> None:
        """A host tensor beside a CUDA tensor: an index on the host is copied, which waits. A 0-d
        one is an argument of the kernel."""
        if any(t.is_cuda for t in given):
            for tensor in given:
                if tensor.device.type == "cpu" and tensor.ndim:
                    self.faults.append(f"{name}: a host tensor {tuple(tensor.shape)} beside CUDA's at {where()}")

    def _check_dtypes(self, name: str, given: list[Tensor]) -> None:
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in given if t.is_floating_point() and t.ndim > 1})
        self.products[" x ".join(dtypes)] += 1
        if len(dtypes) > 1:
            self.faults.append(f"{name} of {' and '.join(dtypes)} at {where()}")

    def _check_operator(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Run the operator's own code, with its launches recorded: its outputs must be what its
        `register_fake` says. Compiled code believes register_fake."""
        real = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        for ours, said in zip(tensors_of(real), tensors_of(out), strict=True):
            if _layout(ours) != _layout(said):
                self.faults.append(
                    f"{func._schema.name} returns {_layout(ours)}, its register_fake says {_layout(said)}, at {where()}"
                )


def _layout(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), str(tensor.dtype), tensor.stride(), str(tensor.device)


class Launch:
    """One launch of a Triton kernel: its grid and its arguments by name."""

    def __init__(self, kernel: Any, grid: Any, args: tuple, options: dict[str, Any]) -> None:
        self.kernel, self.name, self.grid = kernel, kernel.__name__, grid
        names = [parameter.name for parameter in kernel.params]
        self.arguments = {**dict(zip(names, args)), **{k: v for k, v in options.items() if k in names}}
        self.options = {k: v for k, v in options.items() if k not in names}
        missing = [p.name for p in kernel.params if p.name not in self.arguments and not p.has_default]
        if missing:
            raise TypeError(f"{self.name}: launched without {', '.join(missing)}")
        for name, value in self.arguments.items():
            if isinstance(value, Tensor) and not value.is_cuda and not is_locked(value):
                raise TypeError(f"{self.name}: {name} is in host memory that is not page-locked")

    def compiled(self) -> Any:
        """The kernel that this launch needs, compiled for the device."""
        given = {
            name: MockTensor(value.dtype, list(value.shape)) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return self.kernel.run(grid=self.grid, warmup=True, **given, **self.options)


def record_launches() -> list[Launch]:
    """From now on launches of Triton kernels are recorded in this list instead of run.

    Raises TypeError at a launch without an argument, or with one that a GPU cannot read.
    """
    launches: list[Launch] = []
    compile_only = triton.runtime.jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup:
            return compile_only(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self, grid, args, options))
        tell("launch", self.__name__, torch.cuda.current_stream().number)

    triton.runtime.jit.JITFunction.run = run
    return launches
