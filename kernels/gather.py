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
PIXELS = 8  # of one row, in a group
GROUPS = 256  # of a program
WARPS = 4


@triton.jit
def load_word(at, needed, first, last, EDGES: tl.constexpr):
    """The four bytes at each address `at`, a multiple of 4, as uint32; 0 where not `needed`.

    EDGES: whether a word may reach beyond the addresses [first, last) that may be read. The bytes
    of such a word are read one by one.
    """
    if EDGES:
        whole = (at >= first) & (at + 4 <= last)
        word = tl.load(at.to(tl.pointer_type(tl.uint32)), mask=needed & whole, other=0)
        for i in tl.static_range(4):
            mask = needed & (whole == 0) & (at + i >= first) & (at + i < last)
            byte = tl.load((at + i).to(tl.pointer_type(tl.uint8)), mask=mask, other=0)
            word = word | (byte.to(tl.uint32) << (8 * i))
        return word
    else:
        return tl.load(at.to(tl.pointer_type(tl.uint32)), mask=needed, other=0)


@triton.jit
def load_group(window, y, source, width, inside, first, last, S: tl.constexpr, EDGES: tl.constexpr):
    """Six words: the 24 bytes of eight pixels from pixel `source` of row y of a window on.

    Pixels outside [0, S) are not read. A load of one byte takes as long as one of a word, so the
    bytes come as seven aligned words, shifted by the address modulo 4.
    """
    at = window + (y * width.to(tl.int32) + source) * 3
    skip = (at & 3).to(tl.int32)
    words = ()
    for i in tl.static_range(7):
        byte = 4 * i - skip  # of the group, the first one of this word
        needed = inside & (byte < 24)
        if S % 8 != 0:
            needed = needed & (byte + 3 >= -3 * source) & (byte < 3 * (S - source))
        words = words + (load_word(at - skip + 4 * i, needed, first, last, EDGES),)
    aligned = ()
    for i in tl.static_range(6):
        pair = words[i].to(tl.uint64) | (words[i + 1].to(tl.uint64) << 32)
        aligned = aligned + ((pair >> (8 * skip).to(tl.uint64)).to(tl.uint32),)
    return aligned


@triton.jit
def byte_of(words, i: tl.constexpr):
    return (words[i // 4] >> (i % 4 * 8)) & 255


@triton.jit
def interleave(x, start: tl.constexpr, G: tl.constexpr):
    """(8 * G,): x[start] to x[start + 7], each (G,), element by element in turn."""
    even = tl.join(tl.join(x[start], x[start + 4]), tl.join(x[start + 2], x[start + 6]))
    odd = tl.join(tl.join(x[start + 1], x[start + 5]), tl.join(x[start + 3], x[start + 7]))
    return tl.reshape(tl.join(even, odd), (8 * G,))


@triton.jit(do_not_specialize=["length"])
def gather_kernel(
    out_ptr, pixels_ptr, starts_ptr, widths_ptr, picks_ptr, table_ptr, length,
    S: tl.constexpr, GROUPS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Program (b, i): GROUPS groups of view b from i * GROUPS on; row-major, channels last.

    A group is eight pixels of a row; the last group of a row may reach beyond it. length: bytes of
    pixels. EDGES: as in `load_word`.
    """
    view = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    y, x = group // ((S + 7) // 8), group % ((S + 7) // 8) * 8
    inside = y < S
    row, top = tl.load(picks_ptr + view * 4), tl.load(picks_ptr + view * 4 + 1)
    left, flip = tl.load(picks_ptr + view * 4 + 2), tl.load(picks_ptr + view * 4 + 3) != 0
    start, width = tl.load(starts_ptr + row), tl.load(widths_ptr + row)
    # 64 bits for the window's start only: within a window 32 bits are enough.
    first = pixels_ptr.to(tl.int64)
    window = first + start + (top * width + left) * 3
    source = tl.where(flip, S - 8 - x, x)
    words = load_group(window, y, source, width, inside, first, first + length, S, EDGES)
    entries = ()
    for i in tl.static_range(24):
        mirrored = byte_of(words, 21 - i // 3 * 3 + i % 3)  # the same channel of pixel 7 - i // 3
        value = tl.where(flip, mirrored, byte_of(words, i)).to(tl.int32)
        entries = entries + (value * 3 + i % 3,)
    # In shared memory: from global memory, each lookup is a read of two bytes at a random address.
    table = tl.load(table_ptr + tl.arange(0, 1024), mask=tl.arange(0, 1024) < 768, other=0)
    for i in tl.static_range(0, 24, 8):
        found = tl.reshape(tl.gather(table, interleave(entries, i, GROUPS), 0), (GROUPS, 8))
        element = i + tl.arange(0, 8)
        mask = inside[:, None]
        if S % 8 != 0:
            mask = mask & (x[:, None] + (element // 3)[None, :] < S)
        at = ((y * S + x) * 3)[:, None] + element[None, :]
        tl.store(out_ptr + view.to(tl.int64) * (S * S * 3) + at, found, mask=mask)


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
    bits = BITS[out.element_size()]
    if count and size:
        needed = size * cdiv(size, PIXELS)
        groups = min(1 << 13, triton.next_power_of_2(needed)) if INTERPRETED else GROUPS
        gather_kernel[(count, cdiv(needed, groups))](
            out.view(bits), pixels, starts, widths, picks, table.view(bits), pixels.numel(),
            S=size, GROUPS=groups, EDGES=not _in_whole_words(pixels), num_warps=WARPS,
        )  # fmt: skip
    return out


def _in_whole_words(pixels: Tensor) -> bool:
    """Whether the storage holds all bytes of each aligned word of `pixels`.

    torch's own storages begin at an aligned word; one made from a slice of a NumPy array may not.
    """
    offset = pixels.storage_offset()
    begins_aligned = (pixels.data_ptr() - offset) % 4 == 0
    return begins_aligned and cdiv(offset + pixels.numel(), 4) * 4 <= pixels.untyped_storage().nbytes()


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
