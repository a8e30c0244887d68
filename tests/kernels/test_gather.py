"""Views of stored images: kernel and plain twin give the same bits, and both what slicing gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

from fastirt.kernels.gather import gather_views, gather_views_indexed
from fastirt.kernels.passes.tiles import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter


def stored(sizes, seed=0, device=DEVICE):
    """(pixels, starts, widths, list of images) for sizes (H, W)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator) for h, w in sizes]
    lengths = torch.tensor([0, *(p.numel() for p in pictures)])
    pixels = torch.cat([p.flatten() for p in pictures])
    widths = torch.tensor([w for _, w in sizes])
    return pixels.to(device), lengths.cumsum(0)[:-1].to(device), widths.to(device), pictures


def table_of(dtype, device=DEVICE):
    if dtype == torch.uint8:
        return torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 3).to(device)
    return torch.randn(256, 3, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_bits_equal_slicing(dtype, size):
    sizes = [(32, 32), (33, 57), (200, 32), (32, 40)]
    pixels, starts, widths, pictures = stored(sizes)
    generator = torch.Generator().manual_seed(2)
    picks = []
    for view in range(11):
        row = view % len(sizes)
        top, left = (int(torch.randint(0, side - size + 1, (), generator=generator)) for side in sizes[row])
        picks.append([row, top, left, view // 4 % 2])
    picks.append([3, 32 - size, 40 - size, 1])  # the last byte of all
    table = table_of(dtype)
    expected = torch.stack(
        [
            table.cpu()[(window.flip(1) if flip else window).long(), torch.arange(3)]
            for row, top, left, flip in picks
            for window in [pictures[row][top : top + size, left : left + size]]
        ]
    )
    picks = torch.tensor(picks, device=DEVICE)
    for impl in ("triton", "reference", "auto"):
        out = torch.empty(len(picks), size, size, 3, dtype=dtype, device=DEVICE)
        assert gather_views(out, pixels, starts, widths, picks, table, impl=impl) is out
        assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))
    out = gather_views_indexed(torch.empty_like(out), pixels, starts, widths, picks, table)
    assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.fixture
def read_addresses(monkeypatch):
    """Every address that a kernel reads from under the interpreter, with the bytes read there."""
    interpreter, found = triton.runtime.interpreter, []
    real = interpreter._interpreter

    def load(addresses, mask, other, dtype):
        found.append((addresses[mask], np.dtype(dtype).itemsize))
        return real.load(addresses, mask, other, dtype)

    others = {name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(**{**others, "load": load}))
    return found


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does not tell what it read")
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("spare", [0, 2, 3], ids="spare {}".format)
def test_any_offset_and_stride_without_a_read_outside_the_storage(offset, spare, read_addresses):
    """pixels from byte `offset` of a storage on, with `spare` bytes behind; rows of any width.

    The first and the last byte are in a view, flipped and not.
    """
    generator = np.random.default_rng(offset)
    table = torch.arange(768, dtype=torch.int16).view(256, 3).view(torch.bfloat16)
    for size in (8, 13):
        shapes = [(size + i % 2, size + i) for i in range(3)]
        starts = torch.tensor([0, *(h * w * 3 for h, w in shapes)]).cumsum(0)
        count = int(starts[-1])
        # Nothing else lies within 64 bytes of the storage.
        around = generator.integers(0, 256, 64 + offset + count + spare + 64, np.uint8)
        storage = torch.from_numpy(around[64:-64])
        pixels = storage[offset : offset + count]
        picks = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [2, 0, 2, 0], [2, 0, 2, 1]])
        arguments = (pixels, starts[:-1].clone(), torch.tensor([w for _, w in shapes]), picks, table)
        outs = []
        for impl in ("triton", "reference"):
            out = torch.zeros(len(picks), size, size, 3, dtype=table.dtype)
            outs.append(gather_views(out, *arguments, impl=impl).view(torch.int16))
        assert torch.equal(*outs)
        first, last = storage.data_ptr(), storage.data_ptr() + storage.numel()
        near = [(a[(a >= first - 64) & (a < last + 64)].astype(np.int64), length) for a, length in read_addresses]
        near = [(a, length) for a, length in near if a.size]
        assert near and all(a.min() >= first and a.max() + length <= last for a, length in near)
        assert all((a % length == 0).all() for a, length in near)
        whole = (offset + count + 3) // 4 * 4 <= storage.numel()
        assert {length for _, length in near} == ({4} if whole else {1, 4})
        read_addresses.clear()


def test_special_entries_keep_their_bits():
    """NaN, infinities and -0 pass unchanged: entries are moved, never computed with."""
    pixels, starts, widths, _ = stored([(4, 4)])
    table = torch.tensor([float("nan"), float("-inf"), -0.0]).repeat(256, 1).to(DEVICE)
    out = torch.empty(1, 4, 4, 3, device=DEVICE)
    picks = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    gather_views(out, pixels, starts, widths, picks, table, impl="triton")
    assert torch.equal(out.view(torch.int32), table[0].view(torch.int32).expand(1, 4, 4, 3))


def test_bytes_further_than_2_to_the_31():
    """As in a cache of more than 2 GiB; only the last image is ever touched."""
    near, _, _, (picture,) = stored([(4, 5)])
    far = torch.empty(2**31 + 7 + picture.numel(), dtype=torch.uint8, device=DEVICE)
    far[-picture.numel() :] = near
    starts, widths = (torch.tensor([0, last], device=DEVICE) for last in (2**31 + 7, 5))
    out = torch.empty(1, 4, 4, 3, dtype=torch.uint8, device=DEVICE)
    for impl in ("triton", "reference"):
        gather_views(
            out, far, starts, widths, torch.tensor([[1, 0, 1, 1]], device=DEVICE), table_of(torch.uint8), impl=impl
        )
        assert torch.equal(out[0].cpu(), picture[:, 1:].flip(1))


def test_no_views():
    pixels, starts, widths, _ = stored([(4, 4)])
    out = torch.empty(0, 4, 4, 3, device=DEVICE)
    assert (
        gather_views(
            out, pixels, starts, widths, torch.empty(0, 4, dtype=torch.int64, device=DEVICE), table_of(torch.float32)
        ).numel()
        == 0
    )


@pytest.mark.parametrize("fault", ["out", "pixels", "table", "picks", "starts"])
def test_wrong_arguments_are_named(fault):
    pixels, starts, widths, _ = stored([(4, 4)])
    given = dict(
        out=torch.empty(2, 4, 4, 3, device=DEVICE), pixels=pixels, starts=starts, widths=widths,
        picks=torch.zeros(2, 4, dtype=torch.int64, device=DEVICE), table=table_of(torch.float32),
    )  # fmt: skip
    wrong = dict(
        out=given["out"][:, :3],
        pixels=pixels.int(),
        table=given["table"].half(),
        picks=given["picks"][:1],
        starts=starts.int(),
    )
    with pytest.raises(ValueError, match=f"^{fault}: needs"):
        gather_views(*{**given, fault: wrong[fault]}.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pictures_in_page_locked_memory():
    pixels, starts, widths, _ = stored([(32, 32)] * 3)
    picks = torch.tensor([[2, 0, 3, 1], [0, 4, 4, 0]], device=DEVICE)
    outs = [torch.empty(2, 28, 28, 3, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for out, place in zip(outs, (pixels, pixels.cpu().pin_memory())):
        gather_views(out, place, starts, widths, picks, table_of(torch.bfloat16))
    assert torch.equal(*outs)
