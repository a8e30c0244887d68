"""What the products take: rounding to tf32, its mean error, the tile of each choice of flags."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastirt.config.options import Config
from fastirt.distributed.ranks import SINGLE_PROCESS
from fastirt.kernels import contrastive_koleo, pair_stats
from fastirt.kernels.passes import launch
from fastirt.kernels.rounding import product_operand, round_to_tf32
from fastirt.kernels.variants.tile_table import lookup
from fastirt.objective.cross_batch_memory import CrossBatchMemory, build_memory
from fastirt.objective.global_loss import GlobalLoss, MemoryShard
from fastirt.objective.retrieval_loss import RetrievalLoss, build_objective
from tests.kernels.cases import DEVICE, Case, exact, make

LOW_BITS = (1 << 13) - 1


def bits(x):
    return x.view(torch.int32)


def test_rounding_to_tf32_is_to_nearest_and_keeps_what_is_not_finite():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 3
    rounded = round_to_tf32(x)
    assert (bits(rounded) & LOW_BITS == 0).all() and torch.equal(round_to_tf32(rounded), rounded)
    error = rounded.double() - x.double()
    ulp = torch.exp2(torch.floor(torch.log2(x.abs().double())) - 10)
    assert (error.abs() <= ulp / 2).all() and (error / ulp * x.sign()).mean().abs() < 0.004
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11])
    assert round_to_tf32(ties).tolist() == [1 + 2**-10, 1 + 2**-9, -1 - 2**-10]  # away from 0
    special = torch.tensor([0.0, float("inf"), float("-inf"), float("nan"), 2.0])
    assert round_to_tf32(special).nan_to_num(7.0).tolist() == special.nan_to_num(7.0).tolist()
    assert torch.equal(bits(round_to_tf32(torch.tensor(-0.0))), bits(torch.tensor(-0.0)))
    for nan in (0x7FFFFFFF, -1):  # a GPU's and all ones
        assert round_to_tf32(torch.tensor(nan, dtype=torch.int32).view(torch.float32)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operands_have_the_dtype_of_the_products(dtype):
    z = F.normalize(torch.randn(5, 64), dim=1).to(dtype)
    assert torch.equal(product_operand(z, "bf16"), z.bfloat16())
    assert torch.equal(product_operand(z, "fp32"), z.float())
    expected = round_to_tf32(z) if dtype == torch.float32 else z.float()
    assert torch.equal(product_operand(z, "tf32"), expected) and (bits(expected) & LOW_BITS == 0).all()


def near_duplicates(rows=64, slots=500, dim=384):
    """Rows and slots of similarity about 0.8, all of one class."""
    generator = torch.Generator().manual_seed(3)
    center = F.normalize(torch.randn(1, dim, generator=generator), dim=1)
    z, memory = (
        F.normalize(center + 0.5 * torch.randn(n, dim, generator=generator) / dim**0.5, dim=1) for n in (rows, slots)
    )
    return z.to(DEVICE), memory.to(DEVICE)


def mean_error(z, memory, precision):
    """Of the similarities, from the sum of 1 - s over all pairs."""
    ones = [torch.zeros(len(x), dtype=torch.int64, device=DEVICE) for x in (z, memory)]
    stats = pair_stats(z, ones[0], memory, ones[1], precision=precision, impl="triton")
    measured = 1 - stats.pos_sum / stats.pos_count
    return (measured - (z.double() @ memory.double().T).mean()).item()


def test_tf32_similarities_have_no_mean_error_if_the_memory_is_rounded():
    z, memory = near_duplicates()
    assert mean_error(z, memory, "tf32") < -1e-4  # the instructions cut off the memory's last bits
    assert abs(mean_error(z, round_to_tf32(memory), "tf32")) < 5e-6
    assert abs(mean_error(z, memory.bfloat16(), "bf16")) < 1e-4
    assert abs(mean_error(z, memory, "fp32")) < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_the_tf32_loss_and_gradient_are_no_worse_than_tf32_rounding(seed):
    case = make(100, 1000, 384, seed=seed)
    rounded = case._replace(memory=round_to_tf32(case.memory))
    z = case.z.clone().requires_grad_()
    losses = contrastive_koleo(
        z, *rounded[1:4], memory_self=case.memory_self, reduction="nonzero_mean", precision="tf32", impl="triton"
    )
    expected, slopes, _ = exact(case, "nonzero_mean")
    for ours, theirs in zip(losses, expected):
        assert abs(ours.item() / theirs.item() - 1) < 6e-5  # 4.5e-4 where bits were cut off
    for loss, slope in zip(losses[:2], slopes):
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert (gradient.double() - slope).norm() <= 1e-3 * slope.norm()


def test_a_module_that_normalizes_rounds_the_memory():
    z, memory = near_duplicates(20, 60)
    labels = [torch.zeros(len(x), dtype=torch.int64, device=DEVICE) for x in (z, memory)]
    objective = RetrievalLoss(precision="tf32", impl="triton")
    ours = objective(3 * z, labels[0], 2 * memory, labels[1]).memory
    case = Case(z, labels[0], memory, labels[1], None)
    assert ours.item() == pytest.approx(exact(case, "anchor_sum")[0][1].item(), rel=5e-5)


def test_the_memory_rounds_when_it_is_written_or_loaded_and_only_for_tf32():
    vectors, labels = torch.randn(4, 8), torch.arange(4)
    exactly, rounded = CrossBatchMemory(6, 8), CrossBatchMemory(6, 8, tf32=True)
    for memory in (exactly, rounded):
        memory.enqueue(vectors, labels)
    assert torch.equal(exactly.embeddings[:4], vectors)
    assert torch.equal(rounded.embeddings[:4], round_to_tf32(vectors))
    other = CrossBatchMemory(6, 8, tf32=True)
    other.load_state_dict(exactly.state_dict())
    assert torch.equal(other.embeddings, rounded.embeddings)
    bf16 = CrossBatchMemory(6, 8, torch.bfloat16, tf32=True)
    bf16.enqueue(vectors, labels)
    assert torch.equal(bf16.embeddings[:4], vectors.bfloat16())


@pytest.mark.parametrize("impl, precision, expected", [
    ("triton", "tf32", True), ("triton", "fp32", False), ("triton", "bf16", False), ("reference", "tf32", False),
])  # fmt: skip
def test_only_tf32_products_of_the_kernels_need_a_rounded_memory(impl, precision, expected):
    assert RetrievalLoss(impl=impl, precision=precision).rounds_memory(64, DEVICE) is expected


def one_rank():
    """The part of `Ranks` that `GlobalLoss` uses, without a process group."""
    collectives = SimpleNamespace(gather=lambda message: SimpleNamespace(wait=lambda: message))
    return SimpleNamespace(batch_slice=lambda size: (0, size), collectives=collectives)


ENCODERS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (--loss-precision, encoder's dtype, --memory-dtype) -> precision of the products
AUTO = {("fp32", "fp32"): "fp32", ("fp32", "bf16"): "fp32", ("bf16", "fp32"): "tf32", ("bf16", "bf16"): "bf16"}


@pytest.mark.parametrize("loss_precision", ["auto", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("encoder, memory_dtype", list(AUTO))
@pytest.mark.parametrize("distributed", [False, True])
def test_the_tile_of_each_choice_of_flags(monkeypatch, loss_precision, encoder, memory_dtype, distributed):
    """Rows and the batch's columns come in the dtype of the products, the memory in its own."""
    config = Config().replace(loss_precision=loss_precision, memory_dtype=memory_dtype, loss_impl="triton")
    objective = build_objective(config, 64, ENCODERS[encoder], DEVICE)
    precision = AUTO[encoder, memory_dtype] if loss_precision == "auto" else loss_precision
    assert objective.precision == precision
    memory = build_memory(config, 12, 64, DEVICE, SINGLE_PROCESS, tf32=objective.rounds_memory(64, DEVICE))
    z, labels = F.normalize(torch.randn(8, 64, device=DEVICE), dim=1), torch.arange(8, device=DEVICE) // 2
    slots = memory.enqueue(z, labels).slots
    seen, plan = [], launch.plan

    def recorded(kind, precision, columns, rows, batch, slots, *rest):
        if batch + slots:  # KoLeo's gradient has no pairs
            seen.append((kind, precision, columns))
        return plan(kind, precision, columns, rows, batch, slots, *rest)

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def started(*arguments, **constants):
                seen.append(tuple(x.dtype for x in (arguments[0], arguments[3])))
                return self.kernel[grid](*arguments, **constants)

            return started

    monkeypatch.setattr(launch, "plan", recorded)
    monkeypatch.setattr(launch, "stats_kernel", Recorded(launch.stats_kernel))
    monkeypatch.setattr(launch, "grad_kernel", Recorded(launch.grad_kernel))
    z.requires_grad_()
    if distributed:
        shard = MemoryShard(memory.embeddings, memory.labels, slots, False)
        GlobalLoss(objective, one_rank())(z, z.detach(), labels, shard).total.backward()
    else:
        objective(z, labels, memory.embeddings, memory.labels, slots).total.backward()
    assert z.grad.dtype == torch.float32
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    keys = {entry for entry in seen if isinstance(entry[0], str)}
    of_memory = {(kind, precision, memory_dtype) for kind in ("stats", "grad")}
    of_batch = {(kind, precision, "bf16" if precision == "bf16" else "fp32") for kind in ("stats", "grad")}
    assert keys == (of_memory | of_batch if distributed else of_memory)
    assert {entry for entry in seen if not isinstance(entry[0], str)} == {(products, products)}
    for (kind, precision, columns), arch, dim in itertools.product(keys, (80, 90, 100), (192, 384, 768, 1024)):
        assert lookup(kind, arch, precision, columns, dim, 64)
