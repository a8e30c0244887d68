"""Views of stored images: kernel and plain twin give the same bits, and both what slicing gives."""

import pytest
import torch

from fastirt.kernels.gather import gather_views, gather_views_indexed

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
