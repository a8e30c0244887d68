"""The objective: against pytorch-metric-learning and the definition, and at its edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss

from fastirt.config.options import Config
from fastirt.kernels import PAIR_THRESHOLD, contrastive_koleo, nearest
from fastirt.kernels.reference import koleo, pair_loss
from fastirt.objective import retrieval_loss
from fastirt.objective.retrieval_loss import RetrievalLoss, build_objective


def batch(count=24, dim=16, classes=6, seed=0, spread=0.4):
    """Unit vectors around class centers, so that positives and negatives lie on both sides of the
    margin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = torch.randn(classes, dim, generator=generator)
    features = centers[labels] + spread * torch.randn(count, dim, generator=generator) + centers.mean(0)
    return features.requires_grad_(), labels


def by_definition(z, labels, cols, col_labels, own, margin, reduction):
    """Every pair in a Python loop, in float64."""
    pull, push, rows = [], [], 0
    for i in range(len(z)):
        if labels[i] < 0:
            continue
        rows += 1
        for j in range(len(cols)):
            if col_labels[j] < 0 or j == own[i]:
                continue
            s = float(z[i].double() @ cols[j].double())
            (pull if labels[i] == col_labels[j] else push).append(1 - s if labels[i] == col_labels[j] else s - margin)
    if reduction == "anchor_sum":
        return (sum(pull) + sum(max(0.0, v) for v in push)) / max(1, rows)
    mean = lambda values: sum(values) / len(values) if values else 0.0
    return mean([v for v in pull if v > PAIR_THRESHOLD]) + mean([v for v in push if v > PAIR_THRESHOLD])


@pytest.mark.parametrize("with_memory", [False, True])
def test_nonzero_mean_equals_pytorch_metric_learning(with_memory):
    features, labels = batch()
    memory, memory_labels = batch(40, seed=1)
    memory = F.normalize(memory, dim=1).detach()
    theirs = ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=CosineSimilarity())
    expected = theirs(F.normalize(features, dim=1), labels)
    if with_memory:
        expected = expected + theirs(F.normalize(features, dim=1), labels, ref_emb=memory, ref_labels=memory_labels)
    (gradient,) = torch.autograd.grad(expected, features)
    parts = contrastive_koleo(
        F.normalize(features, dim=1),
        labels,
        *((memory, memory_labels) if with_memory else ()),
        reduction="nonzero_mean",
    )
    (ours,) = torch.autograd.grad(parts.batch + parts.memory, features)
    assert float((parts.batch + parts.memory).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["anchor_sum", "nonzero_mean"])
def test_equals_the_definition_with_padding_empty_slots_and_own_slots(reduction):
    features, labels = batch(14)
    z = F.normalize(features, dim=1).detach()
    labels = labels.clone()
    labels[3] = -1
    memory, memory_labels = torch.zeros(30, 16), torch.full((30,), -1)
    memory[:14], memory_labels[:14] = z, labels
    older = F.normalize(batch(6, seed=2)[0], dim=1).detach()
    memory[14:20], memory_labels[14:20] = older, torch.arange(6)
    memory[20:] = float("nan")  # empty slots may hold anything
    z_nan = z.clone()
    z_nan[3] = float("nan")  # and so may padding
    own = torch.arange(14)
    parts = contrastive_koleo(z_nan, labels, memory, memory_labels, memory_self=own, reduction=reduction)
    assert float(parts.batch) == pytest.approx(by_definition(z, labels, z, labels, own, 0.5, reduction), rel=1e-5)
    assert float(parts.memory) == pytest.approx(
        by_definition(z, labels, memory, memory_labels, own, 0.5, reduction), rel=1e-5
    )
    keep = labels >= 0
    assert float(parts.koleo) == pytest.approx(float(koleo(z[keep])), rel=1e-6)


def test_own_slot_is_no_pair_but_an_older_entry_of_the_image_is():
    z = F.normalize(torch.randn(1, 8), dim=1)
    label = torch.tensor([5])
    memory = torch.cat([z, F.normalize(z + 0.5, dim=1)])
    with_own = pair_loss(z, label, memory, torch.tensor([5, 5]), reduction="nonzero_mean")
    loss = pair_loss(z, label, memory, torch.tensor([5, 5]), self_index=torch.tensor([0]), reduction="anchor_sum")
    assert float(loss) == pytest.approx(1 - float(memory[1] @ z[0]), abs=1e-6)
    assert float(with_own) == pytest.approx(
        float(loss), abs=1e-6
    )  # a pair at s = 1 is under the threshold: it does not halve the mean


@pytest.mark.parametrize("reduction", ["anchor_sum", "nonzero_mean"])
def test_no_pair_gives_zero_and_zero_gradient(reduction):
    z = F.normalize(torch.randn(1, 8), dim=1).requires_grad_()
    memory, empty = torch.full((4, 8), float("nan")), torch.full((4,), -1)
    parts = contrastive_koleo(z, torch.tensor([0]), memory, empty, reduction=reduction)
    sum(parts).backward()
    assert [p.item() for p in parts] == [0, 0, 0]
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["z", "memory"])
@pytest.mark.parametrize("reduction", ["anchor_sum", "nonzero_mean"])
def test_non_finite_input_never_gives_a_finite_loss(value, where, reduction):
    z = F.normalize(batch()[0], dim=1).detach()
    labels = torch.arange(24)  # no positives: an infinite negative similarity must show too
    memory, memory_labels = z.clone(), labels + 100
    (z if where == "z" else memory)[7, 2] = value
    parts = contrastive_koleo(z, labels, memory, memory_labels, reduction=reduction)
    assert math.isnan(parts.memory)
    assert where == "memory" or (math.isnan(parts.batch) and not math.isfinite(parts.koleo))


def test_koleo_equals_the_public_regulariser_and_its_gradient_reaches_both_ends():
    z = F.normalize(batch()[0], dim=1).detach().requires_grad_()
    with torch.no_grad():
        dots = z @ z.T
        dots.fill_diagonal_(-1)
        index = dots.argmax(1)
    expected = -torch.log(torch.nn.PairwiseDistance(2)(z, z[index]) + 1e-8).mean()
    (gradient,) = torch.autograd.grad(expected, z)
    (ours,) = torch.autograd.grad(koleo(z), z)
    assert float(koleo(z)) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-7)


def test_nearest_takes_the_lowest_index_of_ties_and_never_itself():
    base = torch.eye(4)[:2]
    z = torch.cat([base, base, -base])  # duplicates and antipodes
    assert nearest(z).index.tolist() == [2, 3, 0, 1, 1, 0]
    same = torch.ones(5, 3) / 3**0.5
    assert nearest(same).index.tolist() == [1, 0, 0, 0, 0]
    assert nearest(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).index.tolist() == [1, 0]


def test_koleo_of_duplicates_is_finite_and_of_one_row_is_zero():
    z = F.normalize(torch.ones(4, 8), dim=1).requires_grad_()
    value = koleo(z)
    value.backward()
    assert math.isfinite(value) and torch.isfinite(z.grad).all()
    assert float(koleo(z[:1])) == 0 and float(koleo(z, torch.tensor([0, -1, -1, -1]))) == 0


def test_module_adds_the_parts_with_lambda():
    z, labels = F.normalize(batch()[0], dim=1), batch()[1]
    losses = RetrievalLoss(lambda_reg=0.3)(z, labels, z.detach(), labels, torch.arange(24))
    assert float(losses.total) == pytest.approx(float(losses.batch + losses.memory + 0.3 * losses.koleo))
    with pytest.raises(ValueError, match="anchor_sum"):
        RetrievalLoss(contrastive="mean")


@pytest.mark.parametrize("contrastive", ["anchor_sum", "nonzero_mean"])
def test_module_normalizes_unless_told_not_to(contrastive):
    """Vectors of any length give the loss of their directions, and the gradient of a loss in one's
    own loop is through them."""
    features, labels = batch()[0].detach() * 7, batch()[1]
    memory = features.flip(0) * torch.rand(len(features), 1).add(0.1)
    raw = features.clone().requires_grad_()
    losses = RetrievalLoss(contrastive=contrastive)(raw, labels, memory, labels.flip(0))
    losses.total.backward()
    own = features.clone().requires_grad_()
    unit = RetrievalLoss(contrastive=contrastive, normalize=False)
    expected = unit(F.normalize(own, dim=1), labels, F.normalize(memory, dim=1), labels.flip(0))
    expected.total.backward()
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    torch.testing.assert_close(raw.grad, own.grad)
    wrong = unit(features, labels, memory, labels.flip(0))
    assert float(wrong.total) > 2 * float(losses.total)
    halves = RetrievalLoss(contrastive=contrastive)(features.bfloat16(), labels)
    assert torch.isfinite(halves.total) and halves.total.dtype == torch.float32


def test_float32_inside_autocast_and_for_half_inputs():
    z = F.normalize(batch()[0], dim=1).detach()
    labels = batch()[1]
    plain = contrastive_koleo(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_koleo(z, labels)
    assert [float(a) for a in plain] == [float(b) for b in inside]
    halves = contrastive_koleo(z.bfloat16(), labels)
    assert all(part.dtype == torch.float32 for part in halves)


def test_only_training_promises_finite_slots(monkeypatch):
    given = []

    def record(*args, **options):
        given.append(options["finite_slots"])
        return contrastive_koleo(*args, **options)

    monkeypatch.setattr(retrieval_loss, "contrastive_koleo", record)
    z, labels = batch()
    for loss in (RetrievalLoss(), build_objective(Config(), z.shape[1], torch.float32, torch.device("cpu"))):
        loss(z, labels)
    assert given == [False, True]
