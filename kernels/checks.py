"""Checks of the public functions' arguments: one line for a wrong shape, dtype, device or name."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.plan import machine
from fastirt.kernels.reference import REDUCTIONS, PairOptions
from fastirt.kernels.variants.tile_table import has_tiles

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
PRECISIONS = ("auto", "bf16", "tf32", "fp32")
IMPLEMENTATIONS = ("auto", "triton", "tiled", "reference")
LARGEST_DIM = 1024  # a tile keeps whole rows on chip
# Kernels that the self-check found faulty on this machine. `gather_views` reads it; the objective
# gets impl="reference" when it is built, so that torch.compile never guards on this set.
REPLACED: set[str] = set()


def check_vectors(name: str, vectors: Tensor, like: Optional[Tensor] = None) -> None:
    """Raises ValueError unless `vectors` is (rows, D) in FLOATS, with `like`'s D and device."""
    if vectors.dim() != 2 or vectors.dtype not in FLOATS:
        raise ValueError(f"{name}: needs shape (rows, D) in float32, bfloat16 or float16, got {_describe(vectors)}")
    if vectors.shape[1] == 0:
        raise ValueError(f"{name}: has D = 0")
    if like is not None and vectors.shape[1] != like.shape[1]:
        raise ValueError(f"{name}: has D = {vectors.shape[1]}, the rows have D = {like.shape[1]}")
    if like is not None and vectors.device != like.device:
        raise ValueError(f"{name}: is on {vectors.device}, the rows are on {like.device}")
    if vectors.shape[0] >= 1 << 31:
        raise ValueError(f"{name}: has {vectors.shape[0]:,} rows, at most 2^31 - 1 are possible")


def check_integers(name: str, values: Tensor, vectors: Tensor, dtypes: tuple = INTEGERS) -> None:
    """Raises ValueError unless `values` is (rows,) integers, one a vector, on their device."""
    if values.dim() != 1 or values.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: needs shape (rows,) in {allowed}, got {_describe(values)}")
    if values.shape[0] != vectors.shape[0]:
        raise ValueError(f"{name}: has {values.shape[0]} entries for {vectors.shape[0]} vectors")
    if values.device != vectors.device:
        raise ValueError(f"{name}: is on {values.device}, the vectors are on {vectors.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")


def check_options(options: PairOptions) -> None:
    """Raises ValueError for a margin that is not finite or an unknown reduction or precision."""
    check_choice("reduction", options.reduction, REDUCTIONS)
    # Refuses NaN too; math.isfinite would break a compiled graph.
    if not -1e6 < options.margin < 1e6:
        raise ValueError(f"margin: needs a finite number, got {options.margin}")
    check_choice("precision", options.precision, PRECISIONS)


def choose_impl(impl: str, rows: Tensor) -> str:
    """ "triton", "tiled" or "reference" for rows (N, D) and a user's `impl`.

    `auto` takes Triton on a GPU that the table has tiles for, where D fits, and tiles on a CPU.
    Raises ValueError for an unknown `impl`, and for "triton" or "tiled" where it cannot run.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    on_cpu = rows.device.type == "cpu"
    if impl == "tiled" and not on_cpu:
        raise ValueError(f"impl 'tiled': the tensors are on {rows.device}, it is for a CPU: use impl='reference'")
    if impl == "tiled" or (impl == "auto" and on_cpu):
        return "tiled"
    arch, _ = machine(rows.device)
    obstacle = None
    if not has_tiles(arch):
        obstacle = f"no tiles for compute capability {arch / 10}"
    elif not rows.shape[1] <= LARGEST_DIM:
        obstacle = f"D = {rows.shape[1]}, at most {LARGEST_DIM}"
    return triton_or_reference(impl, rows.device, obstacle)


def triton_or_reference(impl: str, device: torch.device, obstacle: Optional[str] = None) -> str:
    """ "triton" or "reference" for a kernel that any GPU runs, unless `obstacle` says why not.

    Raises ValueError as `choose_impl` does.
    """
    check_choice("impl", impl, ("auto", "triton", "reference"))
    on_gpu = device.type == "cuda"
    if impl == "auto":
        return "triton" if on_gpu and obstacle is None else "reference"
    if impl == "triton":
        if not on_gpu and not INTERPRETED:
            raise ValueError(
                "impl 'triton': the tensors are on the CPU: use a GPU, or set TRITON_INTERPRET=1 before Python starts"
            )
        if obstacle is not None:
            raise ValueError(f"impl 'triton': {obstacle}: use impl='reference'")
    return impl


def resolve_precision(precision: str, *vectors: Optional[Tensor]) -> str:
    """The precision of products of `vectors`: "bf16", "tf32" or "fp32".

    "auto" is tf32 if one side is float16, which tf32 holds exactly, else bf16 if one is bfloat16.
    For float32 it follows `torch.set_float32_matmul_precision`: highest is fp32, high tf32, medium
    bf16.
    Raises ValueError for an unknown precision.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    dtypes = {v.dtype for v in vectors if v is not None}
    if torch.float16 in dtypes:
        return "tf32"
    if torch.bfloat16 in dtypes:
        return "bf16"
    return {"highest": "fp32", "high": "tf32", "medium": "bf16"}[_float32_matmul_precision()]


@torch.compiler.assume_constant_result
def _float32_matmul_precision() -> str:
    return torch.get_float32_matmul_precision()  # torch.compile cannot trace a call that gives a string


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
