"""The objective in tiles as torch sees it: compiled, under autocast, on any number of threads; its
ways to sum a tile; its memory.
"""

import subprocess
import sys

import pytest
import torch

from fastirt.kernels import contrastive_koleo, nearest, pair_grad, pair_stats
from fastirt.kernels.cpu import tiled, tiles
from tests.kernels.cases import FAST, REDUCTIONS, make

pytestmark = pytest.mark.skipif("tiled" not in FAST, reason="needs tensors on a CPU")


def total(z, labels, memory=None, memory_labels=None, own=None, impl="tiled", **options):
    parts = contrastive_koleo(z, labels, memory, memory_labels, memory_self=own, impl=impl, **options)
    return parts.batch + 0.5 * parts.memory + 0.7 * parts.koleo


def loss_and_gradient(case, **options):
    z = case.z.detach().requires_grad_()
    loss = total(z, *case[1:], **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("with_memory", [True, False])
def test_opcheck(with_memory):
    case = make(12, 30 if with_memory else None, 64)
    torch.library.opcheck(tiled.operator, (*case, 0.2, "nonzero_mean", 1e-8, 1e-6, False))


def test_auto_takes_it_on_a_cpu():
    case = make(12, 30, 64)
    assert torch.equal(loss_and_gradient(case)[1], loss_and_gradient(case, impl="auto")[1])
    with pytest.raises(ValueError, match="impl 'tiled': the tensors are on meta"):
        total(case.z.to("meta"), case.labels.to("meta"))


def test_compiles_whole_with_any_rows_and_slots():
    """Inductor compiles it in the tests of whole steps."""
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, slots in ((20, 50), (21, 63), (33, None)):
        case = make(rows, slots, 64)
        z = case.z.requires_grad_()
        ours, plain = compiled(z, *case[1:]), total(z, *case[1:])
        assert torch.equal(ours, plain)
        assert torch.equal(torch.autograd.grad(ours, z)[0], torch.autograd.grad(plain, z)[0])


def test_autocast_changes_nothing():
    case = make(100, 200, 64)
    loss, gradient = loss_and_gradient(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, other = loss_and_gradient(case)
    assert torch.equal(loss, inside) and torch.equal(gradient, other)


def test_a_second_derivative_is_refused():
    case = make(8, None, 64)
    z = case.z.requires_grad_()
    (gradient,) = torch.autograd.grad(total(z, *case[1:]), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: use impl='reference'"):
        gradient.sum().backward()


def test_a_memory_changed_before_the_backward_changes_nothing():
    case = make(100, 200, 64)
    expected = loss_and_gradient(case)[1]
    z, memory = case.z.requires_grad_(), case.memory.clone()
    loss = total(z, case.labels, memory, *case[3:])
    memory.mul_(0.5)
    assert torch.equal(torch.autograd.grad(loss, z)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_same_bits_every_time(reduction, dtype):
    case = make(300, 3000, 192, dtype)
    results = [loss_and_gradient(case, reduction=reduction) for _ in range(3)]
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("margin", [0.5, -0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_tile_gives_the_same_within_rounding(reduction, margin, monkeypatch):
    """By lists of pairs, by masks, in one tile and in many."""
    case = make(65, 700, 48)
    rows = slice(1, 44)
    found = []
    for tile, height, small, dense in ((1 << 18, 256, 0, 1.0), (1 << 18, 256, 0, -1.0), (512, 16, 1 << 13, 0.2)):
        for name, value in dict(TILE=tile, ROWS=height, SMALL=small, DENSE=dense).items():
            monkeypatch.setattr(tiles, name, value)
        options = dict(reduction=reduction, margin=margin, impl="tiled")
        stats = pair_stats(case.z[rows], case.labels[rows], case.z, case.labels, row_offset=1, **options)
        neighbors = nearest(
            case.z[rows], case.z, row_offset=1, row_labels=case.labels[rows], col_labels=case.labels, impl="tiled"
        )
        one = torch.ones(())
        gradient = pair_grad(*case[:2], *case[2:4], scale_pos=one, scale_neg=2 * one, **options)
        found.append((*loss_and_gradient(case, reduction=reduction, margin=margin), gradient, stats, neighbors))
    for loss, gradient, pairs, stats, neighbors in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(pairs, found[0][2], rtol=1e-4, atol=1e-5)
        assert stats[1::2] == found[0][3][1::2]
        assert torch.equal(neighbors.index, found[0][4].index)


CHECK_MEMORY = """
import resource, torch
torch.set_num_threads(1)
from fastirt.kernels import contrastive_koleo
z = torch.nn.functional.normalize(torch.randn(1024, 8), dim=1).requires_grad_()
memory = torch.nn.functional.normalize(torch.randn(20000, 8), dim=1)
labels, memory_labels = torch.arange(1024) // 2, torch.arange(20000) // 2
def peak(rows):
    sum(contrastive_koleo(z[:rows], labels[:rows], memory, memory_labels, margin=0.9, impl="tiled")).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(64), peak(1024))
"""


@pytest.mark.slow
def test_nothing_of_the_size_of_all_pairs_is_kept():
    """1,024 rows and 20,000 slots are 82 MB in float32."""
    out = subprocess.run([sys.executable, "-c", CHECK_MEMORY], capture_output=True, text=True, check=True).stdout
    few, many = map(int, out.split())
    assert many - few < 25_000  # KiB


@pytest.mark.parametrize("slots", [None, 30])
def test_the_default_dtype_of_torch_changes_nothing(slots):
    case = make(20, slots, 64)
    expected = loss_and_gradient(case)
    torch.set_default_dtype(torch.float64)
    try:
        found = loss_and_gradient(case)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
