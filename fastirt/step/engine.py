"""How a step runs: eager, compiled, or captured once in a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Callable, ContextManager, Optional

import torch

from fastirt.config.options import OptimConfig
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError, first_line
from fastirt.step.cuda_graph import Capture, CaptureFailed
from fastirt.step.optimizer import capturable

log = logging.getLogger("fastirt")


class Engine:
    """`name`: "eager", "compile" (encoders and objective under torch.compile), or "graph" (the
    whole step in one CUDA graph as well).

    compile_options: of torch.compile's Inductor backend. Raises UserError where the engine asked
    for cannot run.
    """

    def __init__(
        self,
        config: OptimConfig,
        device: torch.device,
        ranks: Ranks = SINGLE_PROCESS,
        compile_options: Optional[dict[str, Any]] = None,
    ) -> None:
        self.name = choose_engine(config.engine, device, config.opt, ranks)
        self.may_fall_back = config.engine == "auto"
        self.compile_options = compile_options or {}
        self.capture = Capture(device, ranks.is_distributed) if self.name == "graph" else None

    @property
    def is_captured(self) -> bool:
        return self.capture is not None and self.capture.enabled

    def optimized(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.name == "eager" else compiled(function, **self.compile_options)

    def stream(self) -> ContextManager[Any]:
        """A context for work that must run on the stream of the capture."""
        return self.capture.stream() if self.capture else contextlib.nullcontext()

    def run(self, body: Callable[[], None]) -> None:
        """Run a step's body. With `--engine auto` a failed capture falls back to "compile"."""
        if self.capture is None:
            body()
            return
        try:
            self.capture(body)
        except CaptureFailed as error:
            if not self.may_fall_back:
                raise
            log.warning("%s: going on without the graph", error)
            self.name, self.capture.enabled = "compile", False
            self.capture(body)

    def forget(self) -> None:
        """Capture again in later steps: call it after anything that the step reads has moved."""
        if self.capture is not None:
            self.capture.forget()

    def release(self) -> None:
        """Free the captured graph: NCCL does not end while one holds its communicator."""
        if self.capture is not None:
            self.capture.release()


def choose_engine(name: str, device: torch.device, opt: str, ranks: Ranks = SINGLE_PROCESS) -> str:
    """Resolve "auto": graph on one GPU, compile on many and where the optimizer cannot be captured,
    eager on a CPU.

    Raises UserError where the engine asked for cannot run.
    """
    if name == "auto":
        if device.type != "cuda":
            return "eager"
        return "graph" if capturable(opt) and not ranks.is_distributed else "compile"
    if name == "graph" and device.type != "cuda":
        raise UserError(f"--engine graph: needs a GPU, the device is {device}: use --engine compile or eager")
    if name == "graph" and ranks.is_distributed and ranks.collectives.backend != "nccl":
        raise UserError("--engine graph: gloo cannot be captured in a CUDA graph, only NCCL can: use --engine compile")
    if name == "graph" and not capturable(opt):
        raise UserError(
            f"--engine graph: --opt {opt} counts its steps on the host, which a CUDA graph cannot: "
            "use --engine compile, or an optimizer of torch's own such as adamw"
        )
    return name


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` under torch.compile without graph breaks, for one shape; options: of Inductor.

    Failures of the compiler are a UserError of one line. Random numbers (dropout) stay those of the
    eager engine.
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
