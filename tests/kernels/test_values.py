"""Kernels and tiles against the definition in float64, or in 16 bits against plain PyTorch."""

import pytest
import torch

from fastirt.kernels import contrastive_koleo
from tests.kernels.cases import DIMS, FAST, REDUCTIONS, ROWS, SLOTS, all_pairs, exact, make

WEIGHTS = (1.0, 0.5, 0.7)
LARGE = 200  # from here on only the weighted sum's gradient
CASES = all_pairs(ROWS, SLOTS, DIMS, REDUCTIONS)


def losses_and_gradients(case, reduction, impl, **options):
    """The three losses, and the gradient of each and of their weighted sum."""
    z = case.z.detach().clone().requires_grad_()
    found = contrastive_koleo(
        z,
        case.labels,
        case.memory,
        case.memory_labels,
        memory_self=case.memory_self,
        reduction=reduction,
        impl=impl,
        **options,
    )
    together = sum(weight * loss for weight, loss in zip(WEIGHTS, found))
    wanted = [together] if len(z) > LARGE else [*found, together]
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in wanted]
    return [loss.detach() for loss in found], gradients


def expected_of(case, reduction):
    """The same from the definition in float64, and the number of pairs within rounding of a
    threshold.
    """
    losses, gradients, ambiguous = exact(case, reduction)
    together = sum(weight * gradient for weight, gradient in zip(WEIGHTS, gradients))
    return losses, [together] if len(case.z) > LARGE else [*gradients, together], ambiguous


def assert_close_to_exact(case, reduction, impl):
    losses, gradients = losses_and_gradients(case, reduction, impl, precision="fp32")
    expected, slopes, ambiguous = expected_of(case, reduction)
    # Under nonzero_mean a pair within rounding of a threshold may count or not, which moves a mean
    # of few.
    slack = ambiguous * (reduction == "nonzero_mean")
    for ours, theirs in zip(losses, expected):
        assert ours.dtype == torch.float32 and ours.dim() == 0
        assert abs(ours.item() - theirs.item()) <= 1e-6 * abs(theirs.item()) + 2e-7 + 1e-2 * slack
    for ours, theirs in zip(gradients, slopes):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8 + 0.1 * ambiguous
    return ambiguous


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("rows, slots, dim, reduction", CASES)
def test_float32_is_within_rounding_of_float64(rows, slots, dim, reduction, impl):
    ambiguous = assert_close_to_exact(make(rows, slots, dim, seed=rows + slots + dim), reduction, impl)
    assert ambiguous <= 2  # else the test above has no teeth


@pytest.mark.sweep
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_size(rows, slots, dim, reduction, impl):
    assert_close_to_exact(make(rows, slots, dim, seed=1), reduction, impl)


@pytest.mark.parametrize("impl", FAST)
def test_without_a_memory(impl):
    assert_close_to_exact(make(33, None, 100), "anchor_sum", impl)
    losses, _ = losses_and_gradients(make(33, None, 100), "anchor_sum", impl)
    assert losses[1] == 0


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, slots, dim, reduction", all_pairs((7, 65, 100), (1, 1000), (100, 384, 1024), REDUCTIONS)
)
def test_16_bits_are_as_good_as_plain_pytorch_in_16_bits(rows, slots, dim, reduction, dtype, impl):
    """Error against float64 on the same rounded inputs.

    The twin multiplies in float32, so it is nearly exact: what is allowed beyond it is a gradient's
    last rounding to its dtype, and 2^-15 for the weights of pairs, which are rounded together.
    """
    case = make(rows, slots, dim, dtype)
    losses, gradients = losses_and_gradients(case, reduction, impl)
    plain, plain_gradients = losses_and_gradients(case, reduction, "reference")
    expected, slopes, ambiguous = expected_of(case, reduction)
    last_bit = torch.finfo(dtype).eps
    for ours, theirs, truth in zip(losses, plain, expected):
        assert abs(ours - truth) <= abs(theirs - truth) + 2e-6 * max(1.0, abs(truth.item())) + 0.1 * ambiguous
    for ours, theirs, truth in zip(gradients, plain_gradients, slopes):
        assert ours.dtype == dtype
        allowed = (
            torch.nan_to_num(theirs.double() - truth).norm() + (last_bit + 2**-15) * truth.norm() + 1e-7 + ambiguous
        )
        assert (ours.double() - truth).norm() <= allowed


@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("tf32", 2e-3), ("fp32", 1e-5)])
def test_a_product_in_lower_precision_costs_what_its_rounding_says(precision, tolerance):
    case = make(100, 1000, 384)
    losses, gradients = losses_and_gradients(case, "nonzero_mean", "triton", precision=precision)
    expected, slopes, _ = expected_of(case, "nonzero_mean")
    for ours, theirs in zip(losses, expected):
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    for ours, theirs in zip(gradients, slopes):
        assert (ours.double() - theirs).norm() <= 5 * tolerance * theirs.norm()


@pytest.mark.parametrize("impl", FAST)
def test_memory_of_another_dtype_than_the_batch(impl):
    case = make(65, 1000, 192)
    mixed = case._replace(memory=case.memory.bfloat16())
    losses, gradients = losses_and_gradients(mixed, "nonzero_mean", impl, precision="fp32")
    expected, slopes, _ = expected_of(mixed, "nonzero_mean")
    for ours, theirs in zip(losses, expected):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for ours, theirs in zip(gradients, slopes):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()
