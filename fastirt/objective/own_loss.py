"""`--objective FILE.py:NAME`: a loss of the user in the place of the objective."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fastirt.config.options import Config
from fastirt.config.user_code import load_object, short_name, user_error
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.objective.global_loss import MemoryShard
from fastirt.objective.retrieval_loss import Losses

MEMORY = ("memory", "memory_labels", "memory_self")  # arguments that a loss may take


class OwnLoss(nn.Module):
    """A user's function, `nn.Module`, or class of modules that are made without arguments.

    It is called with embeddings (N, D) float32 of unit length and labels (N,) int64, and by name
    with those of the following that it has arguments for: `memory` (M, D) and `memory_labels` (M,)
    int64, -1 where a slot is empty, and `memory_self` (N,) int64, each row's own slot, which is no
    pair, -1 for none; all None in steps without a memory. It returns a 0-d loss, or four of them:
    total, batch, memory, koleo.

    function: as loaded. text: what the flag says. Raises UserError for one with parameters.
    """

    def __init__(self, function: Any, text: str) -> None:
        super().__init__()
        self.text = text
        if isinstance(function, type):
            try:
                function = function()
            except Exception as error:
                raise user_error("--objective", text, error) from error
        if not callable(function):
            raise self._refused("is no function")
        if isinstance(function, nn.Module) and (number := sum(1 for _ in function.parameters())):
            raise self._refused(
                f"has {number} parameters of its own, which `train` does not train: write a loop of your own "
                "(scripts/examples/own_training_loop.py)"
            )
        self.function, self._has_worked = function, False
        called = function.forward if isinstance(function, nn.Module) else function
        names = inspect.signature(called).parameters.values()
        takes_all = any(argument.kind is argument.VAR_KEYWORD for argument in names)
        self.takes = tuple(name for name in MEMORY if takes_all or name in {argument.name for argument in names})

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        memory: Optional[Tensor] = None,
        memory_labels: Optional[Tensor] = None,
        memory_self: Optional[Tensor] = None,
    ) -> Losses:
        """The four losses, 0-d float32; `batch` is the whole loss where the function returns one.

        Raises UserError for a result that is none, and whatever the function raises.
        """
        values = dict(zip(MEMORY, (memory, memory_labels, memory_self)))
        try:
            result = self.function(embeddings, labels, **{name: values[name] for name in self.takes})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._has_worked and embeddings.is_cuda:  # the capture of a graph has its own message
                raise
            raise user_error("--objective", self.text, error) from error
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if len(parts) not in (1, 4) or not all(isinstance(part, Tensor) and part.dim() == 0 for part in parts):
            found = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
            raise self._refused(f"returned {found}: return one 0-d tensor, or four: total, batch, memory, koleo")
        if not parts[0].requires_grad and embeddings.requires_grad:
            raise self._refused("its loss has no gradient in the embeddings: compute it from them without .detach()")
        self._has_worked = True
        total, *others = (part.float() for part in parts)
        zero = total.detach() * 0
        return Losses(total, *(others or (total.detach(), zero, zero)))

    def rounds_memory(self, dim: int, device: torch.device) -> bool:
        """Never: the memory stays as it is written."""
        return False

    def _refused(self, reason: str) -> UserError:
        return UserError(f"--objective {short_name(self.text)}: {reason}")


class OwnGlobalLoss:
    """`OwnLoss` of the batch of all ranks, each of which computes the whole of it.

    Called like `GlobalLoss`, with the slots (N,) of all rows: the losses are those of one process,
    and a rank's rows alone have a gradient.
    """

    def __init__(self, loss: OwnLoss, ranks: Ranks) -> None:
        self.loss, self.ranks = loss, ranks

    def __call__(self, own: Tensor, whole: Tensor, labels: Tensor, memory: Optional[MemoryShard]) -> Losses:
        first, count = self.ranks.batch_slice(len(whole))
        rows = torch.cat([whole[:first], own, whole[first + count :]])
        return self.loss(rows, labels, *(() if memory is None else memory[:3]))


def build_own_loss(config: Config, device: torch.device) -> OwnLoss:
    """The loss that `--objective` names, on `device`. Raises UserError."""
    text = config.objective.objective
    loss = OwnLoss(load_object("--objective", text), text).to(device)
    if config.memory.memory_sharded:
        raise UserError(f"--objective {short_name(text)}: needs the whole memory: leave --memory-sharded out")
    if config.memory.memory_ratio > 0 and "memory" not in loss.takes:
        logging.getLogger("fastirt").warning(
            "--objective %s: has no argument `memory`: the memory is filled for nothing; pass --memory-ratio 0",
            short_name(text),
        )
    return loss
