"""A Python whose GPU exists in shape only: `python -m tests.fake_cuda.rehearsal PYTHON_ARGUMENTS`.

`scripts/gpu_check.sh` runs with it from end to end on a machine without a GPU: benchmarks with fake
tensors, whose values are ones and whose times are a millisecond; tests are collected, not run.
"""

import contextlib
import os
import runpy
import sys
import traceback
from types import SimpleNamespace

import numpy
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_cuda import install
from benchmarks.fake_cuda.fake_tensors import fake_module


class Ones(TorchDispatchMode):
    """A value that is asked for is one; what compares tensors finds them equal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not args or not isinstance(args[0], FakeTensor):
            return function(*args, **(kwargs or {}))
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if function is torch.ops.aten.equal.default:
            return True
        if function is torch.ops.aten.nonzero.default:
            return args[0].new_zeros(1, args[0].ndim, dtype=torch.int64)
        if function is torch.ops.aten.bincount.default:
            return args[0].new_ones(len(args[0]))
        return function(*args, **(kwargs or {}))


class Generator(torch.Generator):
    """A GPU's would ask the driver for its state."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def install_rest() -> None:
    """What benchmarks need beside a training step."""
    torch.cuda.max_memory_allocated = torch.cuda.memory_reserved = lambda *_: 0
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.Generator = Generator
    torch.compile = lambda function, **_: function
    FakeTensor.numpy = lambda self, **_: numpy.ones(tuple(self.shape), str(self.dtype).removeprefix("torch."))
    FakeTensor.tolist = lambda self: self.numpy().tolist()
    FakeTensor.__array__ = lambda self, *_, **__: self.numpy()
    torch.profiler.profile = lambda **_: contextlib.nullcontext(SimpleNamespace(key_averages=list))
    triton.runtime.jit.JITFunction.run = lambda self, *_, **__: None


def build_for_real() -> None:
    """timm asks for values while it builds a model: drop path's rates would all be one."""
    from fastirt.model import build

    original = build.build_encoder

    def build_encoder(*args, **kwargs):
        with unset_fake_temporarily():
            encoder = original(*args, **kwargs)
        return fake_module(encoder)

    build.build_encoder = build_encoder


def few(module: str, arguments: list[str]) -> list[str]:
    """Flags that make a stage short: an eager step on fake tensors takes half a second."""
    if module == "pytest":
        return ["--collect-only"]
    if module == "benchmarks":
        return ["--repeats", "1", *(["--steps", "1"] if {"step", "train"} & set(arguments) else [])]
    return []


def main() -> int:
    arguments = sys.argv[1:]
    install(os.environ.get("FAKE_DEVICE", "H200"))
    install_rest()
    sys.executable = os.environ.get("REHEARSAL_PYTHON", sys.executable)
    if arguments[:2] == ["-m", "benchmarks"]:
        build_for_real()
    with FakeTensorMode(), Ones():
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            name = arguments[1]
            sys.argv = [name, *arguments[2:], *few(name, arguments)]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def exit_code(error: SystemExit) -> int:
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
        return 1
    return error.code or 0


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = exit_code(error)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors may meet the replaced parts of CUDA
