"""`contrastive_koleo`: the three losses of a batch, differentiable in its embeddings."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastirt.kernels import operators, reference
from fastirt.kernels.checks import check_integers, check_options, check_vectors, choose_impl, resolve_precision
from fastirt.kernels.cpu import tiled
from fastirt.kernels.reference import KOLEO_DISTANCE_EPS, KOLEO_EPS, ContrastiveKoLeo, PairOptions
from fastirt.kernels.rounding import product_operand


def contrastive_koleo(
    z: Tensor,
    labels: Tensor,
    memory: Optional[Tensor] = None,
    memory_labels: Optional[Tensor] = None,
    *,
    memory_self: Optional[Tensor] = None,
    margin: float = 0.5,
    reduction: str = "anchor_sum",
    koleo_eps: float = KOLEO_EPS,
    koleo_distance_eps: float = KOLEO_DISTANCE_EPS,
    precision: str = "auto",
    finite_slots: bool = False,
    impl: str = "auto",
    check: bool = False,
) -> ContrastiveKoLeo:
    """The contrastive loss of a batch against itself and against a memory, and its KoLeo loss.

    Equations 1 and 2 of El-Nouby et al. 2021 (arXiv 2102.05644), written out in
    `kernels/reference.py`. The losses are unweighted: the caller adds them up.

    z: (N, D) float32, bfloat16 or float16, L2-normalized rows; the gradient has the same dtype.
    labels: (N,) int32 or int64; a negative label marks padding.
    memory: (M, D) of any of those dtypes, L2-normalized; it receives no gradient. If it changes
        before the backward, that raises RuntimeError, except with `tiled`, whose gradient is known
        by then.
    memory_labels: (M,) int32 or int64; -1 marks an empty slot, whose row may hold anything.
    memory_self: (N,) int64, each row's own slot in the memory, which is no pair; -1 for none.
    margin: cosine similarity above which a negative pair costs.
    reduction: `anchor_sum`, the paper's sum over pairs divided by N, or `nonzero_mean`, the default
        reducer of pytorch-metric-learning: means over the pairs with a loss above 1e-6.
    koleo_eps: added to the distance inside KoLeo's logarithm.
    koleo_distance_eps: added to each component of the difference inside the norm.
    precision: of the matrix products, `bf16`, `tf32` or `fp32`; `auto` follows 16-bit inputs, and
        torch.get_float32_matmul_precision() for float32 ones. `tf32` rounds z, but cuts off the
        last bits of a float32 memory: round it before, once (`rounding.round_to_tf32`). The
        others take float32.
    finite_slots: whether rows and slots with a negative label are finite too, and so small that no
        product overflows, such as zeros or unit vectors. If so, the kernels load ahead on A100 and
        H100/H200; without it they wait for the labels to leave out what may be NaN.
    impl: `triton`, `tiled` (for a CPU), `reference` (plain PyTorch) or `auto`: tiles on a CPU,
        Triton where the GPU and D allow it.
    check: also check the values of memory_labels and memory_self, which waits for the device.

    Returns (batch, memory, koleo), 0-d float32, each differentiable in z. A contrastive loss
    without a pair is 0 with zero gradient, as is KoLeo of fewer than two rows. NaN or infinity in z
    or in a filled slot makes the losses that use it NaN.
    Raises ValueError for a wrong shape, dtype, device or option; RuntimeError for a second
    derivative, which the reference alone has.
    """
    options = PairOptions(margin, reduction, koleo_eps, koleo_distance_eps, precision, finite_slots)
    check_vectors("z", z)
    check_integers("labels", labels, z)
    check_options(options)
    if (memory is None) != (memory_labels is None):
        raise ValueError("memory and memory_labels: give both or neither")
    if memory is not None:
        check_vectors("memory", memory, z)
        check_integers("memory_labels", memory_labels, memory)
    if memory_self is not None:
        if memory is None:
            raise ValueError("memory_self: there is no memory")
        check_integers("memory_self", memory_self, z, (torch.int64,))
    if check:
        _check_values(memory, memory_labels, memory_self)
    if (impl := choose_impl(impl, z)) != "triton":
        losses = tiled.contrastive_koleo if impl == "tiled" else reference.contrastive_koleo
        return losses(z, labels, memory, memory_labels, memory_self, options)
    memory = None if memory is None else memory.detach()
    precision = resolve_precision(precision, z, memory)
    batch, memory_loss, koleo, *_ = operators.contrastive_koleo(
        z, product_operand(z, precision), labels, memory, memory_labels, memory_self, margin, reduction,
        koleo_eps, koleo_distance_eps, precision, finite_slots,
    )  # fmt: skip
    return ContrastiveKoLeo(batch, memory_loss, koleo)


def _check_values(memory: Optional[Tensor], memory_labels: Optional[Tensor], memory_self: Optional[Tensor]) -> None:
    """Raises ValueError for labels and slots that cannot be right. Waits for the device."""
    if memory_labels is not None and bool((memory_labels < -1).any()):
        raise ValueError("memory_labels: an empty slot is -1, found a smaller value")
    if memory_self is not None:
        if bool(((memory_self < -1) | (memory_self >= memory.shape[0])).any()):
            raise ValueError(f"memory_self: needs slots of 0 to {memory.shape[0] - 1}, or -1 for none")
        used = memory_self[memory_self >= 0]
        if used.unique().numel() != used.numel():
            raise ValueError("memory_self: two rows have the same slot")
