"""Training views of stored images: gather, crop, flip, normalize and cast in one pass.

No arithmetic: each byte selects an entry of a table, so every device gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastirt.kernels.checks import REPLACED, triton_or_reference
from fastirt.kernels.passes.launch import on_its_device
from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.plan import cdiv

# Bytes of an entry: the integer dtype by which its bits are moved.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
BLOCK = 2048  # elements a program writes


@triton.jit
def gather_kernel(
    out_ptr, pixels_ptr, starts_ptr, widths_ptr, picks_ptr, table_ptr, S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (b, i): BLOCK elements of view b from i * BLOCK on; row-major, channels last."""
    view = tl.program_id(0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < S * S * 3
    row, top = tl.load(picks_ptr + view * 4), tl.load(picks_ptr + view * 4 + 1)
    left, flip = tl.load(picks_ptr + view * 4 + 2), tl.load(picks_ptr + view * 4 + 3)
    start, width = tl.load(starts_ptr + row), tl.load(widths_ptr + row)
    y, across = element // (S * 3), element % (S * 3)
    x, channel = across // 3, across % 3
    x = tl.where(flip != 0, S - 1 - x, x)
    # 64 bits for the window's start only: within a window 32 bits are enough.
    window = pixels_ptr + start + (top * width + left) * 3
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
    """Fill `out` with square views of stored images: cropped, flipped and looked up in a table.

    out: (B, S, S, 3), contiguous, of any dtype of 1, 2 or 4 bytes.
    pixels: (bytes,) uint8, the images (H, W, 3) one after the other, on out's device or in
        page-locked host memory.
    starts: (P,) int64; image p begins at the byte pixels[starts[p]].
    widths: (P,) int64, the width of image p in pixels.
    picks: (B, 4) int64: image, top, left (pixels) and flip (0 or 1) of each view. A view must lie
        inside its image, which is not checked.
    table: (256, 3) in out's dtype: what a byte becomes in each channel.
    impl: `triton`, `reference` (plain PyTorch) or `auto`: Triton on a GPU, unless it failed a
        self-check there.

    Returns out. Not differentiable.
    Raises ValueError for a wrong shape, dtype, device or impl.
    """
    _check(out, pixels, starts, widths, picks, table)
    count, size = out.shape[:2]
    if impl == "auto" and "gather_views" in REPLACED:
        impl = "reference"
    if triton_or_reference(impl, out.device) == "reference":
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
    """Twin of `gather_views`, one view at a time; it reads `picks` on the host.

    On a GPU that holds the pixels too it never waits, so that a CUDA graph can capture it.
    """
    if out.is_cuda and pixels.is_cuda:
        return gather_views_indexed(out, pixels, starts, widths, picks, table)
    size = out.shape[1]
    starts, widths = starts.tolist(), widths.tolist()
    windows = torch.empty(out.shape, dtype=torch.uint8, device=pixels.device)
    for view, (row, top, left, flip) in enumerate(picks.tolist()):
        first = starts[row] + (top * widths[row] + left) * 3
        window = pixels.as_strided((size, size, 3), (widths[row] * 3, 3, 1), pixels.storage_offset() + first)
        windows[view] = window.flip(1) if flip else window
    return look_up(windows.to(out.device), table, out)


def gather_views_indexed(
    out: Tensor, pixels: Tensor, starts: Tensor, widths: Tensor, picks: Tensor, table: Tensor
) -> Tensor:
    """The same by the index of each byte, 8 bytes for each pixel of the views."""
    side = torch.arange(out.shape[1], device=out.device)
    row, top, left, flip = picks.unbind(1)
    width = widths[row]
    x = left[:, None] + torch.where(flip[:, None] != 0, side.flip(0), side)  # (B, S)
    y = top[:, None] + side
    first = starts[row][:, None, None] + ((y * width[:, None])[:, :, None] + x[:, None, :]) * 3  # (B, S, S)
    windows = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
    for channel in range(3):
        windows[..., channel] = pixels.index_select(0, (first + channel).flatten()).view(first.shape)
    return look_up(windows, table, out)


def look_up(images: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Fill `out` (B, S, S, 3) with table[byte, channel] of uint8 images (B, S, S, 3); return it."""
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
