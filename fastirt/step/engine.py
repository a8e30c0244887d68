"""How a step runs: eager, with oneDNN's products, compiled, or captured in a CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
from typing import Any, Callable, ContextManager, Optional

import torch

from fastirt.config.options import Config, OptimConfig
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError, first_line
from fastirt.model import onednn_linear
from fastirt.model.encoder import Encoder
from fastirt.model.flops import training_flops
from fastirt.step.cuda_graph import Capture, CaptureFailed
from fastirt.step.optimizer import capturable

log = logging.getLogger("fastirt")


class Engine:
    """`name`: "eager", "onednn" (the same with oneDNN's fp32 products, on a CPU), "compile"
    (encoders and objective under torch.compile), or "graph" (the whole step in one CUDA graph as
    well).

    uses_onednn: whether the linear layers are oneDNN's, with "compile" where they are faster.

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
        on_cpu = device.type == "cpu"
        self.uses_onednn = self.name == "onednn" or (self.name == "compile" and on_cpu and onednn_linear.is_faster())
        self.may_fall_back = config.engine == "auto"
        self.compile_options = compile_options or {}
        self.capture = Capture(device, ranks.is_distributed) if self.name == "graph" else None

    @property
    def is_captured(self) -> bool:
        return self.capture is not None and self.capture.enabled

    def optimized(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.name in ("eager", "onednn") else compiled(function, **self.compile_options)

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
    eager on a CPU (of a new run `engine_of_run` comes first). "onednn" is "auto" on a GPU, where a
    run may go on that began on a CPU.

    Raises UserError where the engine asked for cannot run.
    """
    if name == "onednn" and device.type == "cuda":
        name = "auto"
    if name == "onednn" and not onednn_linear.is_available():
        raise UserError("--engine onednn: this torch has no oneDNN: use --engine eager")
    if name == "auto":
        if device.type != "cuda":
            return "eager"
        return "graph" if capturable(opt) and not ranks.is_distributed else "compile"
    if name == "graph" and device.type != "cuda":
        raise UserError(f"--engine graph: needs a GPU, the device is {device}: use --engine compile, onednn or eager")
    if name == "graph" and ranks.is_distributed and ranks.collectives.backend != "nccl":
        raise UserError("--engine graph: gloo cannot be captured in a CUDA graph, only NCCL can: use --engine compile")
    if name == "graph" and not capturable(opt):
        raise UserError(
            f"--engine graph: --opt {opt} counts its steps on the host, which a CUDA graph cannot: "
            "use --engine compile, or an optimizer of torch's own such as adamw"
        )
    return name


# Of a run on a CPU with `--engine auto`, in floating-point operations of all its steps.
SHORT_RUN = 1e14  # minutes: stays eager, so that its digits do not depend on the CPU
PAYS_COMPILING = 5e14  # for each core, about an hour: a step gains 1 to 4 %, compiling takes up to a minute


def engine_of_run(config: Config, encoder: Encoder, ranks: Ranks = SINGLE_PROCESS) -> str:
    """`--engine` of a new run, with "auto" on a CPU resolved by the length of the run.

    "compile" for hours, if the compiler works here; "onednn" for less if it is faster here and the
    run is not a short one; else "auto" as it is, which is eager. Ranks that share a CPU stay eager.
    """
    name, optim = config.optim.engine, config.optim
    if name != "auto" or torch.device(config.run.device).type != "cpu" or ranks.is_distributed:
        return name
    flops = training_flops(encoder, config.memory.encoder_momentum is not None) * optim.batch_size * optim.max_iter
    if flops > PAYS_COMPILING * torch.get_num_threads() and _compiles() and _traces(encoder, config.input.input_size):
        name = "compile"
    elif flops > SHORT_RUN and config.model.precision == "fp32" and onednn_linear.is_faster():
        name = "onednn"
    if name != "auto":
        log.info("engine: %s, for a run of %.0f PFLOP; --engine eager is the reference", name, flops / 1e15)
    return name


def _compiles() -> bool:
    """Whether torch.compile works on this machine: there may be no compiler, or no headers."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64))
    except Exception:  # whatever it is, eager needs no compiler
        return False
    return True


def _traces(encoder: torch.nn.Module, size: int) -> bool:
    """Whether torch.compile takes the encoder without a graph break. Generates no code."""
    # a copy, because tracing may change what a module holds
    traced = torch.compile(copy.deepcopy(encoder).eval(), backend="eager", fullgraph=True)
    try:
        with torch.no_grad():
            traced(torch.zeros(1, 3, size, size))
    except Exception:
        return False
    return True


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
