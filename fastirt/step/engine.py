"""How a step runs: eager, compiled, or captured once in a CUDA graph and replayed."""

from __future__ import annotations

import logging
from typing import Any, Callable

import torch

from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError, first_line
from fastirt.step.optimizer import capturable

log = logging.getLogger("fastirt")


def choose_engine(name: str, device: torch.device, opt: str, ranks: Ranks = SINGLE_PROCESS) -> str:
    """Resolve "auto": graph on one GPU, compile on many and where the optimiser cannot be captured, eager on a CPU.

    Raises UserError where the engine asked for cannot run.
    """
    if name == "auto":
        if device.type != "cuda":
            return "eager"
        return "graph" if capturable(opt) and not ranks.is_distributed else "compile"
    if name == "graph" and device.type != "cuda":
        raise UserError(f"--engine graph: needs a GPU, the device is {device}: use --engine compile or eager")
    if name == "graph" and ranks.is_distributed and ranks.backend != "nccl":
        raise UserError("--engine graph: gloo cannot be captured in a CUDA graph, only NCCL can: use --engine compile")
    if name == "graph" and not capturable(opt):
        raise UserError(
            f"--engine graph: --opt {opt} counts its steps on the host, which a CUDA graph cannot: use --engine compile, "
            "or an optimiser of torch's own such as adamw"
        )
    return name


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` under torch.compile without graph breaks, for one shape. Failures of the compiler are a UserError of one line.

    Random numbers (dropout) stay those of the eager engine.
    """
    fast = torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": True, **options})

    def call(*args: Any) -> Any:
        try:
            return fast(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            raise UserError(
                f"--engine: torch.compile fails on this model or machine ({first_line(error)}): use --engine eager"
            ) from error

    return call
