"""The parts that many GPUs call, the launch plan, and what a wrong call is told."""

import pytest
import torch

from fastirt.kernels import contrastive_koleo, koleo_grad, nearest, pair_grad, pair_stats
from tests.kernels.cases import DEVICE, FAST, REDUCTIONS, exact, make


@pytest.mark.parametrize("impl", [*FAST, "reference"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_virtual_ranks_compute_what_one_does(reduction, ranks, impl):
    """Each rank takes its rows against all columns and against the memory; counts and sums are
    added up before gradients.
    """
    case = make(64, 130, 100, seed=3)
    share = 64 // ranks
    options = {"reduction": reduction, "precision": "fp32", "impl": impl}
    mine = [slice(rank * share, (rank + 1) * share) for rank in range(ranks)]
    batch = [pair_stats(case.z[s], case.labels[s], case.z, case.labels, row_offset=s.start, **options) for s in mine]
    memory = [
        pair_stats(
            case.z[s], case.labels[s], case.memory, case.memory_labels, self_slots=case.memory_self[s], **options
        )
        for s in mine
    ]
    batch, memory = ([sum(parts) for parts in zip(*stats)] for stats in (batch, memory))
    found = [
        nearest(
            case.z[s], case.z, row_offset=s.start, row_labels=case.labels[s], col_labels=case.labels, impl=impl,
            precision="fp32",
        )
        for s in mine
    ]  # fmt: skip
    rho, index = (torch.cat(parts) for parts in zip(*found))
    rows = (case.labels >= 0).sum()

    def weights(stats):
        if reduction == "anchor_sum":
            return 1 / rows, 1 / rows
        return 1 / stats[1].clamp(min=1), 1 / stats[3].clamp(min=1)

    losses = [stats[0] * weights(stats)[0] + stats[2] * weights(stats)[1] for stats in (batch, memory)]
    losses.append(-torch.where(index >= 0, torch.log(rho + 1e-8), 0.0).double().sum() / rows)
    gradients = []
    for s in mine:
        pos, neg = weights(batch)
        own = 2 * pair_grad(
            case.z[s], case.labels[s], case.z, case.labels, row_offset=s.start, scale_pos=pos, scale_neg=neg, **options
        )
        pos, neg = weights(memory)
        own += pair_grad(
            case.z[s], case.labels[s], case.memory, case.memory_labels, self_slots=case.memory_self[s], scale_pos=pos,
            scale_neg=neg, **options,
        )  # fmt: skip
        gradients.append(own + koleo_grad(case.z[s], case.z, rho, index, row_offset=s.start, scale=1 / rows, impl=impl))
    expected, slopes, _ = exact(case, reduction)
    for ours, theirs in zip(losses, expected):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradient, slope = torch.cat(gradients), sum(slopes)
    assert (torch.nan_to_num(gradient) - slope).norm() <= 1e-5 * slope.norm()


@pytest.mark.parametrize("impl", FAST)
def test_counts_are_integers_and_equal_the_definition(impl):
    case = make(65, 1000, 64)
    ours = pair_stats(case.z, case.labels, case.memory, case.memory_labels, impl=impl)
    plain = pair_stats(case.z, case.labels, case.memory, case.memory_labels, impl="reference")
    assert ours.pos_count.dtype == ours.neg_count.dtype == torch.int64
    assert (ours.pos_count, ours.neg_count) == (plain.pos_count, plain.neg_count)
    torch.testing.assert_close(torch.stack([ours.pos_sum, ours.neg_sum]), torch.stack([plain.pos_sum, plain.neg_sum]))


def call(**changed):
    case = make(4, 6, 64)
    given = dict(
        z=torch.nan_to_num(case.z),
        labels=case.labels,
        memory=case.memory,
        memory_labels=case.memory_labels,
        memory_self=None,
        impl="triton",
    )
    given.update(changed)
    return contrastive_koleo(
        given.pop("z"), given.pop("labels"), given.pop("memory"), given.pop("memory_labels"), **given
    )


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"z": torch.zeros(4)}, "z: needs shape"),
        ({"z": torch.zeros(4, 64, dtype=torch.float64)}, "z: needs shape .* float64"),
        ({"z": torch.zeros(4, 0)}, "z: has D = 0"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels: has 5 entries for 4"),
        ({"labels": torch.zeros(4)}, "labels: needs .* int32 or int64"),
        ({"memory": torch.zeros(6, 32)}, "memory: has D = 32, the rows have D = 64"),
        ({"memory_labels": None}, "memory and memory_labels"),
        (
            {"memory": None, "memory_labels": None, "memory_self": torch.zeros(4, dtype=torch.int64)},
            "there is no memory",
        ),
        ({"memory_self": torch.zeros(4, dtype=torch.int32)}, "memory_self: needs .* int64"),
        ({"reduction": "mean"}, "reduction 'mean': choose one of anchor_sum, nonzero_mean"),
        ({"precision": "fp8"}, "precision 'fp8': choose"),
        ({"impl": "cuda"}, "impl 'cuda': choose"),
        ({"margin": float("nan")}, "margin: needs a finite"),
        ({"memory_labels": torch.full((6,), -2), "check": True}, "an empty slot is -1"),
        ({"memory_self": torch.full((4,), 6), "check": True}, "needs slots of 0 to 5"),
        ({"memory_self": torch.ones(4, dtype=torch.int64), "check": True}, "two rows have the same slot"),
    ],
)
def test_a_wrong_call_is_told_so(changed, said):
    changed = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in changed.items()}
    with pytest.raises(ValueError, match=said):
        call(**changed)


def test_too_wide_for_the_kernels():
    z, labels = torch.randn(3, 1025, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="D = 1025, at most 1024"):
        contrastive_koleo(z, labels, impl="triton")
    contrastive_koleo(z, labels)  # auto takes another


def test_parts_refuse_two_ways_to_say_self():
    case = make(4, 6, 64)
    with pytest.raises(ValueError, match="give one of them"):
        pair_stats(case.z, case.labels, case.z, case.labels, row_offset=0, self_slots=case.memory_self)
    with pytest.raises(ValueError, match="do not fit"):
        koleo_grad(
            case.z,
            case.z,
            torch.zeros(4, device=DEVICE),
            case.memory_self,
            row_offset=1,
            scale=torch.ones((), device=DEVICE),
        )
    with pytest.raises(ValueError, match="0-d tensor"):
        pair_grad(case.z, case.labels, case.z, case.labels, scale_pos=1.0, scale_neg=1.0)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 2**-13), ("tf32", 2**-15), ("fp32", 1e-6)])
def test_the_weights_of_pairs_are_finer_than_the_products_dtype(precision, tolerance):
    """One positive and one negative along axes of their own, so that the gradient shows each
    weight; plain rounding would be 2^-9 or 2^-12 off.
    """
    axes = torch.eye(3, 64, device=DEVICE)
    z, cols, col_labels = axes.sum(0)[None], axes[1:], torch.tensor([7, 8], device=DEVICE)
    ratios = torch.exp(torch.linspace(-8, 8, 40))
    for pos, neg in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (-3.0, 1.0), *((ratio.item(), 1.0) for ratio in ratios)]:
        pos, neg = torch.tensor(pos, device=DEVICE), torch.tensor(neg, device=DEVICE)
        gradient = pair_grad(
            z, col_labels[:1], cols, col_labels, scale_pos=pos, scale_neg=neg, impl="triton", precision=precision
        )
        assert gradient[0, 1].item() == pytest.approx(-pos.item(), rel=tolerance, abs=1e-30)
        assert gradient[0, 2].item() == pytest.approx(neg.item(), rel=1e-6, abs=1e-30)
        assert (gradient[0, 3:] == 0).all() and gradient[0, 0] == 0
