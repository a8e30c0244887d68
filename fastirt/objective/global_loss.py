"""The objective over the batch of all ranks, each of which computes a part of it.

With the whole memory on every rank, a rank compares its own rows with the whole batch and memory.
With a sharded memory, it compares its own rows with the batch, and all rows with its shard. The
ranks then exchange sums, counts and nearest neighbors. The losses are therefore those of one
process with the whole batch, and each rank has the complete gradient of its own embeddings.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fastirt.distributed.ranks import Ranks
from fastirt.kernels import koleo_grad, nearest, pair_grad, pair_stats
from fastirt.kernels.reference import KOLEO_EPS
from fastirt.kernels.rounding import columns_for_products
from fastirt.objective.retrieval_loss import Losses, RetrievalLoss


class MemoryShard(NamedTuple):
    """The whole memory, or this rank's shard of it."""

    embeddings: Tensor  # (M, D)
    labels: Tensor  # (M,) int64, -1 = empty slot
    # int64, the rows' own slots, -1 = not in this shard; None: no row has one. (n,) for this rank's
    # rows if the memory is whole, (N,) for all rows if it is sharded.
    slots: Optional[Tensor]
    sharded: bool


class GlobalLoss:
    """`RetrievalLoss` of the batch of all ranks. All ranks call it at the same time.

    loss: the objective; its vectors must be L2-normalized already, `loss.normalize` is ignored.
    ranks: the process group.
    """

    def __init__(self, loss: RetrievalLoss, ranks: Ranks) -> None:
        self.loss, self.ranks = loss, ranks

    def __call__(self, own: Tensor, whole: Tensor, labels: Tensor, memory: Optional[MemoryShard]) -> Losses:
        """The four losses, 0-d float32, with the same bits on every rank.

        own: (n, D), this rank's embeddings, with gradient.
        whole: (N, D), the embeddings of all ranks in rank order, without gradient.
        labels: (N,) integers of all ranks; a negative label marks padding.
        memory: the memory or this rank's shard of it; None: none.

        The gradient in `own` is that of the whole batch's loss: weight gradients summed over the
        ranks are those of one process.
        """
        total, *parts = _WholeBatch.apply(own, whole, labels, memory, self.loss, self.ranks)
        return Losses(total, *parts)


class _WholeBatch(torch.autograd.Function):
    """(total, batch, memory, koleo), differentiable in `own` only."""

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
        options = dict(
            margin=loss.margin, reduction=loss.contrastive, precision=loss.precision, impl=loss.impl,
            finite_slots=loss.finite_slots,
        )  # fmt: skip
        columns = columns_for_products(whole, loss.precision, loss.impl)  # made once a step
        products = columns[first : first + count]
        numbers = [*pair_stats(own, own_labels, columns, labels, row_offset=first, products=products, **options)]
        if memory is not None:
            rows = (whole, labels) if memory.sharded else (own, own_labels)
            options["products"] = columns if memory.sharded else products
            numbers += pair_stats(*rows, memory.embeddings, memory.labels, self_slots=memory.slots, **options)
        neighbors = dict(row_labels=own_labels, col_labels=labels, precision=loss.precision, impl=loss.impl)
        rho, index = nearest(own, whole, row_offset=first, products=(products, columns), **neighbors)

        # One exchange. Each rank adds up sums and counts in rank order, so all have the same bits.
        message = torch.cat([torch.stack([n.double() for n in numbers]), rho.double(), index.double()])
        gathered = ranks.collectives.gather(message[None]).wait()  # (ranks, len(numbers) + 2 n)
        numbers = gathered[:, : len(numbers)].sum(0)
        rho = gathered[:, len(numbers) :][:, :count].reshape(-1).float()  # (N,)
        index = gathered[:, len(numbers) + count :].reshape(-1).long()  # (N,)

        size = (labels >= 0).sum().clamp(min=1)
        batch, *scales = _contrastive(numbers[:4], size, loss.contrastive)
        memory_loss = torch.zeros_like(batch)
        if memory is not None:
            memory_loss, *memory_scales = _contrastive(numbers[4:], size, loss.contrastive)
            scales += memory_scales
        terms = torch.where(index >= 0, -torch.log(rho + KOLEO_EPS), rho * 0)  # NaN stays NaN
        koleo = terms.sum() / size
        losses = (batch.float(), memory_loss.float(), koleo)
        ctx.memory, ctx.loss, ctx.ranks, ctx.options, ctx.first = memory, loss, ranks, options, first
        ctx.save_for_backward(own, whole, columns, labels, rho, index, (1 / size).float(), *(s.float() for s in scales))
        return losses[0] + losses[1] + loss.lambda_reg * losses[2], *losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        own, whole, columns, labels, rho, index, per_row, *scales = ctx.saved_tensors
        total, batch, memory_grad, koleo = grads
        batch, memory_grad, koleo = total + batch, total + memory_grad, ctx.loss.lambda_reg * total + koleo
        own_labels, options, first = labels[ctx.first : ctx.first + len(own)], ctx.options, ctx.first
        # A pair of the batch stands in two rows, hence the 2.
        pull, push = 2 * batch * scales[0], 2 * batch * scales[1]
        own_products = columns[first : first + len(own)]
        gradient = pair_grad(
            own, own_labels, columns, labels, scale_pos=pull, scale_neg=push, row_offset=first,
            **{**options, "products": own_products},
        )  # fmt: skip
        if (memory := ctx.memory) is not None:
            rows = (whole, labels) if memory.sharded else (own, own_labels)
            part = pair_grad(
                *rows, memory.embeddings, memory.labels, scale_pos=memory_grad * scales[2],
                scale_neg=memory_grad * scales[3], self_slots=memory.slots, **options,
            )  # fmt: skip
            gradient = gradient + (ctx.ranks.collectives.scatter_sum(part) if memory.sharded else part)
        gradient = gradient + koleo_grad(
            own, whole, rho, index, scale=koleo * per_row, row_offset=first, impl=ctx.loss.impl
        )
        return gradient, None, None, None, None, None


def _contrastive(numbers: Tensor, size: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, weight of each positive pair, weight of each negative pair), 0-d float64.

    numbers: (4,) float64, the totals of `pair_stats`. size: 0-d, the rows without padding.
    """
    pos_sum, pos_count, neg_sum, neg_count = numbers
    if reduction == "anchor_sum":
        return (pos_sum + neg_sum) / size, 1 / size.double(), 1 / size.double()
    pull, push = 1 / pos_count.clamp(min=1), 1 / neg_count.clamp(min=1)
    return pos_sum * pull + neg_sum * push, pull, push
