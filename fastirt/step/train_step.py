"""One optimizer step.

`TrainStep.body` is all of its arithmetic; the engine runs it as it is, compiled, or captured.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn

from fastirt.config.options import Config
from fastirt.config.random_streams import seed_torch
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.loading.augment import own_augmentation
from fastirt.loading.batch import Batch
from fastirt.model.encoder import Encoder, normalization_constants
from fastirt.objective.cross_batch_memory import CrossBatchMemory, build_memory
from fastirt.objective.own_loss import OwnLoss, build_own_loss
from fastirt.objective.retrieval_loss import Losses, RetrievalLoss, build_objective
from fastirt.step.engine import Engine
from fastirt.step.forward_pass import DistributedForwardPass, Embedded, ForwardPass
from fastirt.step.networks import Networks
from fastirt.step.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate, step_unless
from fastirt.step.step_counters import StepCounters
from fastirt.step.step_input import StepInput

# of a step, in the order in which they end
PHASES = ("copy", "forward", "objective", "backward", "optimizer")


class TrainStep:
    """Networks, memory, objective and optimizer; calling it does one step and never waits for the
    device.

    The first non-finite loss or gradient sets `counters.first_bad_step`; from then on no step
    updates weights, momentum encoder or memory. `on_phase_end` is called with "start" and then
    with the name of each phase of PHASES as it ends.

    In a distributed job each rank has its slice of the global batch and computes its rows of
    everything: embeddings are gathered for objective and memory, DistributedDataParallel sums
    gradients while the backward runs, and weights, momentum encoder and memory (unless sharded)
    stay the same bits on all ranks. `bytes_moved`: bytes that one step sends and receives.
    """

    def __init__(
        self,
        networks: Networks,
        forward_pass: ForwardPass,
        optimizer: torch.optim.Optimizer,
        step_input: StepInput,
        engine: Engine,
        config: Config,
        ranks: Ranks,
    ) -> None:
        self.networks, self.forward_pass, self.optimizer = networks, forward_pass, optimizer
        self.input, self.engine, self.config, self.ranks = step_input, engine, config, ranks
        self.counters = StepCounters(step_input.device)
        self.on_phase_end: Callable[[str], None] = lambda phase: None
        self.bytes_moved = 0
        self._learning_rate: Optional[float] = None

    def __call__(self, batch: Batch) -> None:
        """One step on this rank's slice of a batch: images and labels (B,), on the device."""
        self.on_phase_end("start")
        config, step = self.config, batch.step
        with_memory = self.memory is not None and step >= config.memory.memory_start
        batch_size = len(batch) * self.ranks.world_size
        part = self.ranks.batch_slice(batch_size)
        moved = self.input.copy_batch(batch, part[0])
        if moved or with_memory != self.forward_pass.with_memory:
            self.engine.forget()
        self.forward_pass.with_memory = with_memory
        self.counters.step_number.fill_(step)
        rate = learning_rate(step, config.optim)
        if rate != self._learning_rate:
            set_learning_rate(self.optimizer, rate)
            self._learning_rate = rate
        seed_torch(config.run.seed, step, self.ranks.rank, self.device)
        self.networks.draw_masks(config.run.seed, step, batch_size, part, keys=with_memory)
        self.engine.run(self.body)
        self.counters.steps_summed += 1

    def body(self) -> None:
        """The step on what `__call__` put in place: device work only, the same every time."""
        moved = self.ranks.collectives.bytes_moved
        self.networks.begin_step()
        images, labels = self.input.build_images(), self.input.labels
        self.on_phase_end("copy")
        embedded = self.forward_pass.embed(images, labels)
        self.on_phase_end("forward")
        losses = self.forward_pass.losses(embedded)
        self.on_phase_end("objective")
        losses.total.backward()
        self.networks.collect_gradients()
        self.on_phase_end("backward")
        self.bytes_moved = self.ranks.collectives.bytes_moved - moved
        self._update(losses, embedded)
        self.on_phase_end("optimizer")

    def _update(self, losses: Losses, embedded: Embedded) -> None:
        """Clip, then update optimizer, momentum encoder and memory, unless a step was bad."""
        norm = clip_gradients(self.networks.weights, self.config.optim.clip_grad)
        with torch.no_grad():
            skip = self.counters.flag(losses.total, norm)
            step_unless(self.optimizer, skip)
            self.networks.update_momentum(skip)
            if embedded.replaced is not None:
                self.memory.rollback(embedded.replaced, skip)
            self.counters.add(losses, norm)

    @property
    def device(self) -> torch.device:
        return self.input.device

    @property
    def encoder(self) -> Encoder:
        return self.networks.encoder

    @property
    def memory(self) -> Optional[CrossBatchMemory]:
        return self.forward_pass.memory

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds besides the optimizer's state."""
        return _Saved(self).state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError where names or shapes differ."""
        _Saved(self).load_state_dict(state)


class _Saved(nn.Module):
    """A step's tensors under the checkpoint's names; `twin` is the momentum encoder."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__()
        self.encoder, self.twin, self.memory = step.encoder, step.networks.momentum_encoder, step.memory
        self.register_buffer("first_bad_step", step.counters.first_bad_step)
        self.register_buffer("sums", step.counters.sums)


def build_train_step(
    encoder: Encoder,
    config: Config,
    train_size: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
    compile_options: Optional[dict[str, Any]] = None,
) -> TrainStep:
    """The step that `config` describes.

    encoder: moved to `device` and trained in place.
    train_size: images of the training set, of which the memory holds a share.
    compile_options: of Inductor, with the engines "compile" and "graph".
    Raises UserError where engine, optimizer or loss implementation cannot run here.
    """
    engine = Engine(config.optim, device, ranks, compile_options)
    networks = Networks(encoder, config, device)
    if engine.uses_onednn:
        networks.use_onednn()
    augment = own_augmentation(config.input.augment, config.run.seed)
    step_input = StepInput(*normalization_constants(config, encoder), networks.dtype, device, augment)
    if config.objective.objective is None:
        objective: RetrievalLoss | OwnLoss = build_objective(config, encoder.embed_dim, networks.dtype, device)
    else:
        objective = build_own_loss(config, device)
    rounded = objective.rounds_memory(encoder.embed_dim, device)
    memory = build_memory(config, train_size, encoder.embed_dim, device, ranks, tf32=rounded)
    optimizer = build_optimizer(encoder.vit, config.optim, capture=engine.name == "graph")
    if ranks.is_distributed:
        forward_pass: ForwardPass = DistributedForwardPass(
            networks, objective, memory, engine, ranks, config.memory.memory_sharded
        )
    else:
        forward_pass = ForwardPass(networks, objective, memory, engine)
    return TrainStep(networks, forward_pass, optimizer, step_input, engine, config, ranks)
