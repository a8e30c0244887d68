"""Inputs at the edge: duplicates, ties, padding, NaN, no pairs, odd memory layouts."""

import pytest
import torch
import torch.nn.functional as F

from fastirt.kernels import contrastive_koleo, nearest, pair_grad, pair_stats
from tests.kernels.cases import DEVICE, FAST, REDUCTIONS, Case, exact, make

IMPL = "triton"  # of the running test
BOTH = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True, params=FAST)
def implementation(request, monkeypatch):
    monkeypatch.setitem(globals(), "IMPL", request.param)


def unit(rows, dim, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1).to(DEVICE)


def integers(*values):
    return torch.tensor(values, device=DEVICE)


def run(case, reduction="anchor_sum", precision="fp32", **options):
    z = case.z.detach().clone().requires_grad_()
    found = contrastive_koleo(
        z, case.labels, case.memory, case.memory_labels, memory_self=case.memory_self, reduction=reduction,
        impl=IMPL, precision=precision, **options,
    )  # fmt: skip
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in found]
    return [loss.item() for loss in found], gradients


def assert_exact(case, reduction, margin=0.5):
    losses, gradients = run(case, reduction, margin=margin)
    expected, slopes, _ = exact(case, reduction, margin)
    assert losses == pytest.approx([loss.item() for loss in expected], rel=1e-6, abs=1e-6)
    for ours, theirs in zip(gradients, slopes):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7


@BOTH
@pytest.mark.parametrize(
    "labels",
    [
        [4] * 9, list(range(9)), [0, 1, 2, 3, 4, 5, 6, 7, 0],
        [2**40 + 1, 1, 2**33 + 1, 1, 2**40 + 1, 5, 6, 2**33 + 1, 7],
    ],
    ids=["all equal", "all distinct", "one positive", "differ above bit 32"],
)  # fmt: skip
def test_labels(labels, reduction):
    labels = integers(*labels)
    assert_exact(Case(unit(9, 100), labels, unit(20, 100, 1), labels.repeat(3)[:20], None), reduction, margin=0.1)


def test_int32_labels_are_the_same_as_int64():
    case = make(65, 63, 64)
    small = case._replace(labels=case.labels.int(), memory_labels=case.memory_labels.int())
    assert run(case)[0] == run(small)[0]


@BOTH
def test_exact_duplicates_and_antipodes(reduction):
    z = unit(6, 64)
    z[3], z[4] = z[0], -z[1]
    case = Case(z, integers(0, 1, 0, 0, 1, 2), None, None, None)
    losses, gradients = run(case, reduction)
    expected, slopes, _ = exact(case, "anchor_sum")
    # nonzero_mean leaves the duplicate, at loss 0, out by its threshold
    if reduction == "anchor_sum":
        assert losses[0] == pytest.approx(expected[0].item(), rel=1e-6)
    assert losses[2] == pytest.approx(expected[2].item(), rel=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[2] - slopes[2]).norm() <= 1e-5 * slopes[2].norm()


@BOTH
def test_a_whole_batch_of_one_vector_is_finite(reduction):
    z = unit(1, 100).repeat(70, 1)
    rho, index = nearest(z, impl=IMPL)
    assert index.tolist() == [1] + [0] * 69
    torch.testing.assert_close(rho, torch.full_like(rho, 1e-5), rtol=1e-5, atol=0)
    losses, gradients = run(
        Case(z, torch.arange(70, device=DEVICE) % 3, z, torch.arange(70, device=DEVICE) % 3, None), reduction
    )
    assert all(torch.isfinite(torch.tensor(losses))) and all(torch.isfinite(gradient).all() for gradient in gradients)
    # each row pulls on its neighbour by this much per component
    pull = -1 / 70 / ((1e-5 + 1e-8) * 1e-5) * 1e-6
    expected = torch.full_like(z, pull)
    expected[0] -= 69 * pull
    expected[1] -= pull
    torch.testing.assert_close(gradients[2], expected, rtol=1e-4, atol=0)


def test_a_neighbour_shared_by_all():
    hub = unit(1, 64)
    z = F.normalize(torch.cat([hub, hub + 0.9 * unit(199, 64, 3)]), dim=1)
    assert (nearest(z, impl=IMPL).index[1:] == 0).sum() > 150
    assert_exact(Case(z, torch.arange(200, device=DEVICE) // 2, None, None, None), "anchor_sum")


def test_exact_ties_take_the_lowest_index():
    z = torch.eye(8, 64, device=DEVICE)
    z = torch.cat([z, z, z])
    assert nearest(z, impl=IMPL).index.tolist() == [*range(8, 16), *range(8), *range(8)]
    apart = torch.eye(5, 64, device=DEVICE)
    assert nearest(apart, impl=IMPL).index.tolist() == [1, 0, 0, 0, 0]
    assert nearest(z, impl="reference").index.tolist() == nearest(z, impl=IMPL).index.tolist()


def test_the_neighbour_is_within_rounding_of_the_true_minimum():
    case = make(300, None, 100, seed=7)
    similarity = case.z.double() @ case.z.double().T
    candidates = (case.labels >= 0)[None, :] & ~torch.eye(300, dtype=torch.bool, device=DEVICE)
    best = torch.where(candidates, similarity, -2.0).max(1).values
    rho, index = nearest(case.z, row_labels=case.labels, precision="fp32", impl=IMPL)
    kept = case.labels >= 0
    assert (index[~kept] == -1).all() and (rho[~kept] == 0).all()
    found = similarity[torch.arange(300, device=DEVICE)[kept], index[kept]]
    assert (best[kept] - found).max() < 1e-6
    apart = torch.linalg.vector_norm(case.z[kept].double() - case.z[index[kept]].double() + 1e-6, dim=1)
    torch.testing.assert_close(rho[kept].double(), apart, rtol=1e-6, atol=0)


@BOTH
def test_a_similarity_at_the_margin_costs_nothing_and_pulls_nothing(reduction):
    z = torch.zeros(3, 64, device=DEVICE)
    z[0, 0] = 1.0
    z[1, 0], z[1, 1] = 0.5, 0.75**0.5
    z[2, 2] = 1.0
    losses, gradients = run(Case(z, integers(0, 1, 2), None, None, None), reduction, margin=0.5)
    assert losses[0] == 0 and (gradients[0] == 0).all()


@BOTH
@pytest.mark.parametrize("filled", [0, 1, 30])
def test_a_memory_empty_or_partly_filled(filled, reduction):
    memory, labels = unit(30, 64, 1), torch.arange(30, device=DEVICE) % 4
    memory[filled:], labels[filled:] = float("inf"), -1
    case = Case(unit(9, 64), torch.arange(9, device=DEVICE) % 4, memory, labels, None)
    assert_exact(case, reduction, margin=0.1)
    if filled == 0:
        losses, gradients = run(case, reduction)
        assert losses[1] == 0 and (gradients[1] == 0).all()


@BOTH
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_finite_slots_give_the_same_bits(precision, reduction):
    """What finite empty slots and padded rows hold changes no bit, with `finite_slots` or not."""
    case = make(30, 300, 100)
    empty = case._replace(z=case.z.clone(), memory=case.memory.clone())
    assert empty.memory[case.memory_labels < 0].isnan().all() and empty.z[case.labels < 0].isnan().all()
    empty.memory[case.memory_labels < 0] = -3.5
    empty.z[case.labels < 0] = -3.5
    options = dict(margin=0.1, precision=precision)
    expected, gradients = run(case, reduction, **options)
    for finite_slots in (False, True):
        losses, others = run(empty, reduction, finite_slots=finite_slots, **options)
        assert losses == expected
        assert all(torch.equal(a, b) for a, b in zip(gradients, others))
    assert torch.tensor(run(case, reduction, finite_slots=True, **options)[0]).isnan().any()  # else NaN shows
    stats = [
        pair_stats(
            c.z, c.labels, c.memory, c.memory_labels, self_slots=c.memory_self, reduction=reduction, impl=IMPL,
            finite_slots=c is empty, precision=precision,
        )
        for c in (case, empty)
    ]  # fmt: skip
    assert stats[0] == stats[1]
    scale = torch.tensor(0.7, device=DEVICE)
    grads = [
        pair_grad(
            c.z, c.labels, c.memory, c.memory_labels, scale_pos=scale, scale_neg=scale, reduction=reduction,
            impl=IMPL, finite_slots=c is empty, precision=precision,
        )
        for c in (case, empty)
    ]  # fmt: skip
    assert torch.equal(*grads)


@BOTH
def test_the_batch_inside_the_memory_with_and_without_its_own_slots(reduction):
    z, labels = unit(20, 100), torch.arange(20, device=DEVICE) // 2
    memory, memory_labels = torch.cat([unit(30, 100, 1), z]), torch.cat([torch.arange(30, device=DEVICE), labels])
    own = torch.arange(30, 50, device=DEVICE)
    assert_exact(Case(z, labels, memory, memory_labels, own), reduction, margin=0.1)
    if reduction == "anchor_sum":
        assert_exact(Case(z, labels, memory, memory_labels, None), reduction, margin=0.1)


@BOTH
def test_no_pair_is_zero_with_zero_gradient(reduction):
    for case in (
        Case(unit(1, 64), integers(3), None, None, None),
        Case(unit(2, 64), integers(-1, 3), unit(2, 64), integers(-1, -1), None),
        Case(unit(0, 64), integers().long(), unit(5, 64), integers(1, 2, 3, 4, 5), None),
    ):
        losses, gradients = run(case, reduction)
        assert losses == [0, 0, 0] and all((gradient == 0).all() for gradient in gradients)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["batch", "memory"])
def test_a_value_that_is_not_finite_always_shows(where, value, reduction):
    for row in (0, 40):
        case = make(41 if where == "batch" else 20, 130, 100, seed=2)
        (case.z if where == "batch" else case.memory)[row if where == "batch" else row * 3, 99] = value
        if where == "memory":
            case.memory_labels[row * 3] = 5
        losses, _ = run(case, reduction)
        expected = [True, True, True] if where == "batch" else [False, True, False]
        assert [loss != loss for loss in losses] == expected
    alone = Case(torch.full((1, 64), value, device=DEVICE), integers(0), None, None, None)
    losses, _ = run(alone, reduction)
    assert losses[0] != losses[0] and losses[2] != losses[2]


def test_a_zero_row():
    z = unit(5, 64)
    z[2] = 0
    assert_exact(Case(z, integers(0, 0, 1, 1, 2), None, None, None), "anchor_sum")


def test_inputs_of_any_strides():
    case = make(33, 63, 100)
    strided = case._replace(
        z=torch.stack([case.z, case.z], 1)[:, 0], memory=case.memory.T.contiguous().T,
        labels=torch.stack([case.labels, case.labels], 1)[:, 1], memory_self=case.memory_self.repeat_interleave(2)[::2],
    )  # fmt: skip
    z = strided.z.requires_grad_()
    ours = contrastive_koleo(z, *strided[1:4], memory_self=strided.memory_self, impl=IMPL)
    (gradient,) = torch.autograd.grad(sum(ours), z)
    losses, gradients = run(case)
    assert [loss.item() for loss in ours] == losses
    torch.testing.assert_close(gradient, sum(gradients), rtol=1e-5, atol=1e-7)


def test_rows_further_apart_than_2_to_the_31():
    storage = torch.empty(2**31 + 2**30 + 64, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((4, 64), (2**30, 1))
    far.copy_(unit(4, 64, 5))
    labels = integers(0, 1, 0, 1)
    case = Case(far, labels, far, labels, None)
    near = Case(far.clone(), labels, far.clone(), labels, None)
    z = far.detach().requires_grad_()
    ours = contrastive_koleo(z, labels, far, labels, impl=IMPL, precision="fp32")
    (gradient,) = torch.autograd.grad(sum(ours), z)
    losses, gradients = run(near)
    assert [loss.item() for loss in ours] == losses == run(case)[0]
    torch.testing.assert_close(gradient, sum(gradients), rtol=1e-2, atol=1e-3)
