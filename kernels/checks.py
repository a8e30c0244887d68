"""What the public functions accept: one clear line for a wrong shape, dtype, device or word."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.plan import machine
from fastirt.kernels.tile_table import has_tiles

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
PRECISIONS = ("auto", "bf16", "tf32", "fp32")
IMPLEMENTATIONS = ("auto", "triton", "reference")
LARGEST_DIM = 1024  # a tile keeps whole rows on chip


def check_vectors(name: str, vectors: Tensor, like: Optional[Tensor] = None) -> None:
    """(?, D) float32, bfloat16 or float16; where `like` is given, its D and its device. Raises ValueError."""
    if vectors.dim() != 2 or vectors.dtype not in FLOATS:
        raise ValueError(f"{name}: needs shape (rows, D) in float32, bfloat16 or float16, got {_said(vectors)}")
    if vectors.shape[1] == 0:
        raise ValueError(f"{name}: has D = 0")
    if like is not None and vectors.shape[1] != like.shape[1]:
        raise ValueError(f"{name}: has D = {vectors.shape[1]}, the rows have D = {like.shape[1]}")
    if like is not None and vectors.device != like.device:
        raise ValueError(f"{name}: is on {vectors.device}, the rows are on {like.device}")
    if vectors.shape[0] >= 1 << 31:
        raise ValueError(f"{name}: has {vectors.shape[0]:,} rows, at most 2^31 - 1 are possible")


def check_integers(name: str, values: Tensor, vectors: Tensor, dtypes: tuple = INTEGERS) -> None:
    """(rows,) integers on the device of `vectors`. Raises ValueError."""
    if values.dim() != 1 or values.dtype not in dtypes:
        said = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: needs shape (rows,) in {said}, got {_said(values)}")
    if values.shape[0] != vectors.shape[0]:
        raise ValueError(f"{name}: has {values.shape[0]} entries for {vectors.shape[0]} vectors")
    if values.device != vectors.device:
        raise ValueError(f"{name}: is on {values.device}, the vectors are on {vectors.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")


def choose_impl(impl: str, rows: Tensor) -> str:
    """ "triton" or "reference": `auto` takes Triton on a GPU that `configs` has tiles for, where D fits. Raises ValueError where `impl` cannot run."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    fits = rows.shape[1] <= LARGEST_DIM
    arch, _ = machine(rows.device)
    if impl == "auto":
        return "triton" if rows.is_cuda and fits and has_tiles(arch) else "reference"
    if impl == "triton":
        if not rows.is_cuda and not INTERPRETED:
            raise ValueError(
                "impl 'triton': the tensors are on the CPU: use a GPU, or set TRITON_INTERPRET=1 before Python starts"
            )
        if not has_tiles(arch):
            raise ValueError(f"impl 'triton': no tiles for compute capability {arch / 10}: use impl='reference'")
        if not fits:
            raise ValueError(f"impl 'triton': D = {rows.shape[1]}, at most {LARGEST_DIM}: use impl='reference'")
    return impl


def resolve_precision(precision: str, *vectors: Optional[Tensor]) -> str:
    """Resolve "auto": bf16 where one side is bf16; tf32 for fp16, which it holds exactly; for float32 what
    `torch.set_float32_matmul_precision` says (highest: fp32, high: tf32, medium: bf16). Raises ValueError for an unknown word."""
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    dtypes = {v.dtype for v in vectors if v is not None}
    if torch.float16 in dtypes:
        return "tf32"
    if torch.bfloat16 in dtypes:
        return "bf16"
    return {"highest": "fp32", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]


def _said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
