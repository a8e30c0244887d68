"""Training views of stored images: gather, crop, flip, normalise and cast in one pass over the batch.

Nothing is computed: each byte selects an entry of a table, so every device gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastirt.kernels.checks import IMPLEMENTATIONS, check_choice
from fastirt.kernels.launch import on_its_device
from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.plan import cdiv

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # an entry's bytes: the integers that carry it
BLOCK = 2048  # elements of a program


@triton.jit
def gather_kernel(
    out_ptr, pixels_ptr, starts_ptr, widths_ptr, picks_ptr, table_ptr, S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (b, i): elements i * BLOCK and on of view b, in the order row, column, channel."""
    view = tl.program_id(0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < S * S * 3
    row, top = tl.load(picks_ptr + view * 4), tl.load(picks_ptr + view * 4 + 1)
    left, flip = tl.load(picks_ptr + view * 4 + 2), tl.load(picks_ptr + view * 4 + 3)
    start, width = tl.load(starts_ptr + row), tl.load(widths_ptr + row)
    y, across = element // (S * 3), element % (S * 3)
    x, channel = across // 3, across % 3
    x = tl.where(flip != 0, S - 1 - x, x)
    window = pixels_ptr + start + (top * width + left) * 3  # 64-bit once; within the window 32 bits are enough
    value = tl.load(window + (y * width.to(tl.int32) + x) * 3 + channel, mask=inside, other=0)
    entry = tl.load(table_ptr + value.to(tl.int32) * 3 + channel, mask=inside, other=0)
    tl.store(out_ptr + view.to(tl.int64) * (S * S * 3) + element, entry, mask=inside)


@on_its_device
def gather_views(
    out: Tensor,
    pixels: Tensor,
    starts: Tensor,
    widths: Tensor,
    picks: Tensor,
    table: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Fill `out` (B, S, S, 3), of any dtype of 1, 2 or 4 bytes, with views of stored images; returns it.

    pixels (bytes,) uint8: images (H, W, 3) one after the other, on the GPU or in page-locked host memory. starts, widths (P,)
    int64: image p begins at pixels[starts[p]] and has rows of widths[p] pixels. picks (B, 4) int64: image, top, left,
    flip (0 or 1) of each view; the window must lie inside the image, which is not checked. table (256, 3), out's dtype:
    what a byte becomes, by channel. impl: `triton`, `reference`, or by device. Not differentiable. Raises ValueError for
    wrong shapes, dtypes or words.
    """
    _check(out, pixels, starts, widths, picks, table)
    count, size = out.shape[:2]
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "triton" and not (out.is_cuda or INTERPRETED):
        raise ValueError("impl 'triton': the tensors are on the CPU: use a GPU, or TRITON_INTERPRET=1")
    if impl == "reference" or not (out.is_cuda or impl == "triton"):
        return gather_views_reference(out, pixels, starts, widths, picks, table)
    block = 1 << 16 if INTERPRETED else BLOCK
    bits = BITS[out.element_size()]
    if count and size:
        gather_kernel[(count, cdiv(size * size * 3, block))](
            out.view(bits), pixels, starts, widths, picks, table.view(bits), S=size, BLOCK=block, num_warps=8
        )  # fmt: skip
    return out


def gather_views_reference(
    out: Tensor, pixels: Tensor, starts: Tensor, widths: Tensor, picks: Tensor, table: Tensor
) -> Tensor:
    """`gather_views` in plain PyTorch, one image at a time; reads `picks` on the host."""
    size = out.shape[1]
    starts, widths = starts.tolist(), widths.tolist()
    windows = torch.empty(out.shape, dtype=torch.uint8, device=pixels.device)
    for view, (row, top, left, flip) in enumerate(picks.tolist()):
        first = starts[row] + (top * widths[row] + left) * 3
        window = pixels.as_strided((size, size, 3), (widths[row] * 3, 3, 1), pixels.storage_offset() + first)
        windows[view] = window.flip(1) if flip else window
    return look_up(windows.to(out.device), table, out)


def look_up(images: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Fill `out` (B, S, S, 3) with table[byte, channel] for images (B, S, S, 3) uint8; returns it."""
    for channel in range(3):
        bytes = images[..., channel].reshape(-1).int()
        out[..., channel] = table[:, channel].contiguous().index_select(0, bytes).view(images.shape[:3])
    return out


def _check(out: Tensor, pixels: Tensor, starts: Tensor, widths: Tensor, picks: Tensor, table: Tensor) -> None:
    if out.ndim != 4 or out.shape[1] != out.shape[2] or out.shape[3] != 3 or not out.is_contiguous():
        raise ValueError(f"out: needs a contiguous (B, S, S, 3), got {tuple(out.shape)}")
    if out.element_size() not in BITS:
        raise ValueError(f"out: needs a dtype of 1, 2 or 4 bytes, got {out.dtype}")
    if pixels.dtype != torch.uint8 or pixels.ndim != 1 or not pixels.is_contiguous():
        raise ValueError(f"pixels: needs a contiguous (bytes,) uint8, got {tuple(pixels.shape)} {pixels.dtype}")
    if table.shape != (256, 3) or table.dtype != out.dtype or not table.is_contiguous():
        raise ValueError(f"table: needs (256, 3) {out.dtype}, got {tuple(table.shape)} {table.dtype}")
    if picks.shape != (out.shape[0], 4) or starts.ndim != 1 or starts.shape != widths.shape:
        raise ValueError("picks: needs (B, 4); starts and widths: (P,) each")
    for name, value in (("starts", starts), ("widths", widths), ("picks", picks)):
        if value.dtype != torch.int64 or not value.is_contiguous() or value.device != out.device:
            raise ValueError(f"{name}: needs contiguous int64 on {out.device}, got {value.dtype} on {value.device}")
