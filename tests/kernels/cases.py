"""Inputs for the kernels' tests, and the losses written out in float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fastirt.kernels import PAIR_THRESHOLD

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = (1, 2, 7, 63, 64, 65, 100, 1000)
SLOTS = (0, 1, 63, 1000, 4097)
DIMS = (64, 100, 192, 384, 768, 1024)
REDUCTIONS = ("anchor_sum", "nonzero_mean")
FAST = ("triton", "tiled") if DEVICE.type == "cpu" else ("triton",)  # implementations beside the reference


class Case(NamedTuple):
    z: Tensor
    labels: Tensor
    memory: Optional[Tensor]
    memory_labels: Optional[Tensor]
    memory_self: Optional[Tensor]


def all_pairs(*choices: tuple) -> list[tuple]:
    """Few tuples, one value of each choice in each, such that any two values of two choices meet in
    one of them.
    """
    missing = {
        ((i, a), (j, b))
        for (i, one), (j, other) in itertools.combinations(enumerate(choices), 2)
        for a, b in itertools.product(one, other)
    }
    found = []

    def pairs(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    while missing:
        best = max(itertools.product(*choices), key=lambda row, missing=missing: len(missing & pairs(row)))
        missing = missing - pairs(best)
        found.append(best)
    return found


def make(rows: int, slots: Optional[int], dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Clustered unit vectors; every tenth batch row is padding and every ninth slot is empty, both
    full of NaN; the batch's first rows stand in the memory, as their own slots.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = max(2, rows // 8)
    centers = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(classes, (count,), generator=generator)
        noise = torch.randn(count, dim, generator=generator) / dim**0.5
        return F.normalize(centers[labels] * 0.8 + noise, dim=1), labels

    z, labels = draw(rows)
    padding = torch.arange(rows) % 10 == 9
    z[padding], labels[padding] = float("nan"), -1
    z = z.to(dtype)
    if slots is None:
        return Case(z.to(DEVICE), labels.to(DEVICE), None, None, None)
    memory, memory_labels = draw(slots)
    memory = memory.to(dtype)
    shared = min(rows, slots)
    memory[:shared], memory_labels[:shared] = z[:shared], labels[:shared]
    own = torch.where(torch.arange(rows) < shared, torch.arange(rows), -1)
    empty = torch.arange(slots) % 9 == 8
    memory[empty], memory_labels[empty] = float("nan"), -1
    return Case(*(value.to(DEVICE) for value in (z, labels, memory, memory_labels, own)))


def exact(case: Case, reduction: str, margin: float = 0.5) -> tuple[list[Tensor], list[Tensor], int]:
    """(losses, their gradients at z, number of pairs within 1e-6 of a threshold), all in float64
    from the definition.
    """
    z = case.z.double().requires_grad_()
    count = int((case.labels >= 0).sum())
    own = torch.arange(len(z), device=z.device)
    batch, close = _term(z, case.labels, z, case.labels, own, reduction, margin, count)
    memory, close_too = z[:0].sum(), 0
    if case.memory is not None:
        memory, close_too = _term(
            z, case.labels, case.memory.double(), case.memory_labels, case.memory_self, reduction, margin, count
        )
    rows = [i for i in range(len(z)) if case.labels[i] >= 0]
    koleo = z[:0].sum()
    if len(rows) > 1:
        kept = z[rows]
        similarity = (kept @ kept.T).detach().fill_diagonal_(float("-inf"))
        koleo = -(torch.linalg.vector_norm(kept - kept[similarity.argmax(1)] + 1e-6, dim=1) + 1e-8).log().mean()
    losses = [batch, memory, koleo]
    gradients = [
        torch.zeros_like(z)
        if not loss.requires_grad
        else torch.nan_to_num(torch.autograd.grad(loss, z, retain_graph=True)[0])
        for loss in losses
    ]
    return [loss.detach() for loss in losses], gradients, close + close_too


def _term(z, labels, cols, col_labels, own, reduction, margin, count):
    valid, filled = labels >= 0, col_labels >= 0
    s = torch.where(valid[:, None], z, 0.0) @ torch.where(filled[:, None], cols, 0.0).T
    pair = valid[:, None] & filled[None, :]
    if own is not None:
        pair = pair & (torch.arange(len(cols), device=z.device)[None, :] != own[:, None])
    same = labels[:, None] == col_labels[None, :]
    pull, push = (1 - s)[pair & same], (s - margin)[pair & ~same]
    if reduction == "anchor_sum":
        return (pull.sum() + push.relu().sum()) / max(1, count), int((push.abs() < 1e-6).sum())
    loss = sum(
        part[part > PAIR_THRESHOLD].mean() if (part > PAIR_THRESHOLD).any() else part.sum() * 0 for part in (pull, push)
    )
    return loss, int(sum(((part - PAIR_THRESHOLD).abs() < 1e-6).sum() for part in (pull, push)))
