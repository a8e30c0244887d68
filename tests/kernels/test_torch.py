"""The operator as torch sees it: compiled, under autocast, captured, differentiated twice, run
again.
"""

import pytest
import torch
import torch.nn.functional as F

from fastirt.kernels import contrastive_koleo, operators
from fastirt.kernels.passes import launch
from fastirt.kernels.reference import PairOptions
from fastirt.kernels.tile_table import Tile
from tests.kernels.cases import DEVICE, REDUCTIONS, make

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def total(z, labels, memory, memory_labels, own=None, **options):
    parts = contrastive_koleo(z, labels, memory, memory_labels, memory_self=own, impl="triton", **options)
    return parts.batch + 0.5 * parts.memory + 0.7 * parts.koleo


@pytest.mark.parametrize("with_memory", [True, False])
def test_opcheck(with_memory):
    case = make(12, 30 if with_memory else None, 64)
    z = torch.nan_to_num(case.z).requires_grad_()
    arguments = (z, *case[1:], 0.2, "nonzero_mean", 1e-8, 1e-6, "fp32", False)
    torch.library.opcheck(operators.contrastive_koleo, arguments)


def test_compiles_whole_with_any_rows_and_slots():
    compiled = torch.compile(total, fullgraph=True, dynamic=True)
    for rows, slots in ((20, 50), (21, 63), (33, 7)):
        case = make(rows, slots, 64)
        z = case.z.requires_grad_()
        ours, plain = compiled(z, *case[1:]), total(z, *case[1:])
        assert ours == plain
        assert torch.equal(torch.autograd.grad(ours, z)[0], torch.autograd.grad(plain, z)[0])


def test_autocast_changes_nothing():
    case = make(20, 50, 64)
    plain = total(case.z, *case[1:])
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert total(case.z, *case[1:]) == plain


def test_a_second_derivative_is_refused():
    case = make(8, None, 64)
    z = case.z.requires_grad_()
    (gradient,) = torch.autograd.grad(total(z, *case[1:]), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: use impl='reference'"):
        gradient.sum().backward()


def test_a_memory_changed_before_the_backward_is_noticed():
    case = make(8, 20, 64)
    loss = total(case.z.requires_grad_(), *case[1:])
    case.memory.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_same_bits_every_time(reduction):
    case = make(100, 1000, 192, torch.bfloat16)
    results = []
    for _ in range(3):
        z = case.z.detach().requires_grad_()
        loss = total(z, *case[1:], reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss, z)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(
            gradient.view(torch.int16), results[0][1].view(torch.int16)
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_tile_gives_the_same_within_rounding(reduction):
    case = make(65, 700, 192)
    options = PairOptions(margin=0.5, reduction=reduction, precision="fp32")
    rows = launch.Columns(case.z, case.labels)
    memory = launch.Columns(case.memory, case.memory_labels, case.memory_self)
    one = torch.ones((), device=DEVICE)
    found = []
    tiles = [(32, 32, 64, 3, True), (64, 64, 64, 2, False), (32, 64, 32, 2, True), (16, 128, 64, 1, False)]
    for bm, bn, bd, grad_chunks, skip in tiles:
        tile = Tile(bm, bn, bd, warps=4, stages=1, grad_chunks=grad_chunks, waves=2, skip_inactive=skip)
        f = launch.forward(case.z, case.labels, rows, memory, options, tile=tile)
        gradient = launch.backward(
            case.z, case.labels, rows, memory, options, scales=f.scales, grads=(one, one, one), rho=f.rho,
            index=f.index, tile=tile,
        )  # fmt: skip
        found.append((torch.stack(f[:3]), gradient, f.counts))
    for losses, gradient, counts in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)
        assert torch.equal(counts, found[0][2])


@pytest.mark.parametrize("with_memory", [True, False])
def test_nonzero_mean_is_pytorch_metric_learnings_contrastive_loss(with_memory):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import ContrastiveLoss

    case = make(60, 200, 100, seed=9)
    features = torch.randn(60, 100, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)) * 3
    features = (features + 4 * torch.nan_to_num(case.z)).requires_grad_()
    labels, filled = torch.arange(60, device=DEVICE) % 7, case.memory_labels >= 0
    z = F.normalize(features, dim=1)
    memory, memory_labels = case.memory[filled], case.memory_labels[filled]
    theirs = ContrastiveLoss(pos_margin=1, neg_margin=0.3, distance=CosineSimilarity())
    options = dict(margin=0.3, reduction="nonzero_mean", impl="triton", precision="fp32")
    if with_memory:
        expected = theirs(features, labels, ref_emb=memory, ref_labels=memory_labels)
        ours = contrastive_koleo(z, labels, memory, memory_labels, **options).memory
    else:
        expected = theirs(features, labels)
        ours = contrastive_koleo(z, labels, **options).batch
    assert ours.item() == pytest.approx(expected.item(), rel=2e-6)
    slope, expected_slope = (torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in (ours, expected))
    assert (slope - expected_slope).norm() <= 1e-5 * expected_slope.norm()


def test_forward_and_backward_of_all_three_losses_are_five_launches(monkeypatch):
    started = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            started.append(self.kernel)
            return self.kernel[grid]

    for name in ("stats_kernel", "rows_kernel", "totals_kernel", "grad_kernel", "combine_kernel"):
        monkeypatch.setattr(launch, name, Counted(getattr(launch, name)))
    case = make(64, 300, 64)
    total(case.z.requires_grad_(), *case[1:]).backward()
    assert len(started) == len(set(started)) == 5


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cuda_graph_replays_it(dtype):
    case = make(64, 5000, 384, dtype)
    z = torch.nan_to_num(case.z).requires_grad_()
    arguments = (case.labels, case.memory, case.memory_labels, case.memory_self)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(total(z, *arguments), z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = total(z, *arguments)
        (gradient,) = torch.autograd.grad(loss, z)
    with torch.no_grad():
        z.copy_(F.normalize(torch.randn_like(z), dim=1))
    graph.replay()
    plain = total(z, *arguments)
    assert torch.equal(loss, plain) and torch.equal(gradient, torch.autograd.grad(plain, z)[0])


@needs_gpu
def test_no_wait_for_the_device_and_five_launches():
    case = make(64, 5000, 384, torch.bfloat16)
    z = torch.nan_to_num(case.z).requires_grad_()
    total(z, *case[1:]).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            parts = contrastive_koleo(z, *case[1:4], memory_self=case.memory_self, impl="triton")
            torch.autograd.grad(parts, z, [torch.ones((), device=DEVICE)] * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launches = [event for event in profile.events() if "kernel" in event.name and event.device_type.name == "CUDA"]
    assert len([event for event in launches if not event.name.startswith("void at::")]) == 5
