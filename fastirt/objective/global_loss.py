"""The objective over the batch of all ranks, of which each computes its part.

With the memory on every rank, a rank takes its own rows against the whole batch and the whole memory; with the memory in
shards, its own rows against the batch and all rows against its shard. Sums, counts and neighbours are then exchanged, so the losses
are those of one process with the whole batch, and each rank has the whole gradient of its own embeddings.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fastirt.distributed.ranks import Ranks
from fastirt.kernels import koleo_grad, nearest, pair_grad, pair_stats
from fastirt.kernels.reference import KOLEO_EPS
from fastirt.objective.retrieval_loss import Losses, RetrievalLoss


class MemoryShard(NamedTuple):
    """The memory, or a shard of it: embeddings (M, D), labels (M,), -1 = empty; slots: the rows' own ones in it (-1: elsewhere), or None.

    slots are of this rank's n rows where the memory is whole, of all N where it is a shard.
    """

    embeddings: Tensor
    labels: Tensor
    slots: Optional[Tensor]
    sharded: bool


class GlobalLoss:
    """`RetrievalLoss` of the batch that the ranks have together. Called by all ranks at once."""

    def __init__(self, loss: RetrievalLoss, ranks: Ranks) -> None:
        self.loss, self.ranks = loss, ranks

    def __call__(self, own: Tensor, whole: Tensor, labels: Tensor, memory: Optional[MemoryShard]) -> Losses:
        """own (n, D): this rank's embeddings, with gradient; whole (N, D) and labels (N,): all ranks' in order, without.

        Losses are 0-d float32, the same bits on every rank. Their gradient in `own` is that of the whole batch's loss: summed over
        the ranks, the gradients of the weights are those of one process.
        """
        total, *parts = _Whole.apply(own, whole, labels, memory, self.loss, self.ranks)
        return Losses(total, *parts)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        whole: Tensor,
        labels: Tensor,
        memory: Optional[MemoryShard],
        loss: RetrievalLoss,
        ranks: Ranks,
    ) -> tuple[Tensor, ...]:
        first, count = ranks.batch_slice(len(whole))
        own, own_labels = own.detach(), labels[first : first + count]
        options = dict(margin=loss.margin, reduction=loss.contrastive, precision=loss.precision, impl=loss.impl)
        near = dict(precision=loss.precision, impl=loss.impl)
        numbers = [*pair_stats(own, own_labels, whole, labels, row_offset=first, **options)]
        if memory is not None:
            rows = (whole, labels) if memory.sharded else (own, own_labels)
            numbers += pair_stats(*rows, memory.embeddings, memory.labels, self_slots=memory.slots, **options)
        rho, index = nearest(own, whole, row_offset=first, row_labels=own_labels, col_labels=labels, **near)

        # One exchange: sums and counts are added in the order of ranks, so every rank has the same bits.
        message = torch.cat([torch.stack([n.double() for n in numbers]), rho.double(), index.double()])
        found = ranks.collectives.gather(message[None]).wait()
        numbers = found[:, : len(numbers)].sum(0)
        rho = found[:, len(numbers) :][:, :count].reshape(-1).float()
        index = found[:, len(numbers) + count :].reshape(-1).long()

        size = (labels >= 0).sum().clamp(min=1)
        batch, *scales = _contrastive(numbers[:4], size, loss.contrastive)
        against = torch.zeros_like(batch)
        if memory is not None:
            against, *more = _contrastive(numbers[4:], size, loss.contrastive)
            scales += more
        terms = torch.where(index >= 0, -torch.log(rho + KOLEO_EPS), rho * 0)  # NaN stays NaN
        koleo = terms.sum() / size
        losses = (batch.float(), against.float(), koleo)
        ctx.memory, ctx.loss, ctx.ranks, ctx.options, ctx.first = memory, loss, ranks, options, first
        ctx.save_for_backward(own, whole, labels, rho, index, (1 / size).float(), *(s.float() for s in scales))
        return losses[0] + losses[1] + loss.lambda_reg * losses[2], *losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        own, whole, labels, rho, index, share, *scales = ctx.saved_tensors
        total, batch, against, koleo = grads
        batch, against, koleo = total + batch, total + against, ctx.loss.lambda_reg * total + koleo
        own_labels, options, first = labels[ctx.first : ctx.first + len(own)], ctx.options, ctx.first
        # A pair of the batch stands in two rows, hence the 2.
        pull, push = 2 * batch * scales[0], 2 * batch * scales[1]
        gradient = pair_grad(
            own, own_labels, whole, labels, scale_pos=pull, scale_neg=push, row_offset=first, **options
        )
        if (memory := ctx.memory) is not None:
            rows = (whole, labels) if memory.sharded else (own, own_labels)
            part = pair_grad(
                *rows, memory.embeddings, memory.labels, scale_pos=against * scales[2], scale_neg=against * scales[3],
                self_slots=memory.slots, **options,
            )  # fmt: skip
            gradient = gradient + (ctx.ranks.collectives.scatter_sum(part) if memory.sharded else part)
        gradient = gradient + koleo_grad(
            own, whole, rho, index, scale=koleo * share, row_offset=first, impl=ctx.loss.impl
        )
        return gradient, None, None, None, None, None


def _contrastive(numbers: Tensor, size: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, weight of each positive pair, weight of each negative pair), float64, from the four totals of `pair_stats`."""
    pos_sum, pos_count, neg_sum, neg_count = numbers
    if reduction == "anchor_sum":
        return (pos_sum + neg_sum) / size, 1 / size.double(), 1 / size.double()
    pull, push = 1 / pos_count.clamp(min=1), 1 / neg_count.clamp(min=1)
    return pos_sum * pull + neg_sum * push, pull, push
