"""One optimiser step. `TrainStep.body` is all of its arithmetic; the engines run it as it is, compiled, or captured."""

from __future__ import annotations

import contextlib
import logging
from typing import Callable

import torch
from torch import Tensor, nn

from fastirt.config.options import Config
from fastirt.config.random_streams import torch_seed
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.loading.batch import Batch
from fastirt.model.bf16_copy import Bf16Copy
from fastirt.model.encoder import Encoder
from fastirt.model.momentum_encoder import make_twin, momentum_update
from fastirt.model.precision import autocast, resolve_precision
from fastirt.objective.cross_batch_memory import CrossBatchMemory, Replaced, memory_size
from fastirt.objective.global_loss import GlobalLoss, MemoryShard
from fastirt.objective.retrieval_loss import Losses, build_objective
from fastirt.step.cuda_graph import Capture, CaptureFailed
from fastirt.step.engine import choose_engine, compiled
from fastirt.step.gradient_sync import GradientSync
from fastirt.step.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate, step_unless
from fastirt.step.step_input import StepInput

log = logging.getLogger("fastirt")

LOSS_NAMES = ("loss", "contrastive_batch", "contrastive_memory", "koleo", "grad_norm")
PHASES = ("copy", "forward", "objective", "backward", "optimiser")  # of a step, in the order in which they end


class TrainStep(nn.Module):
    """Encoder, twin, memory, objective and optimiser; calling it does one step and never waits for the device.

    `engine` is how: "eager", "compile" (encoder, twin and objective under torch.compile) or "graph" (all of `body` in one
    CUDA graph as well). The first non-finite loss or gradient sets `first_bad_step` (0-d int64 on the device, -1 = none), which from
    then on holds back every update of weights, twin and memory. `sums` (5,) float64 adds up the values named in LOSS_NAMES
    over `steps_summed` steps. `on_phase_end` is called with "start" and then with the name of each phase as it ends.

    With many `ranks`, each has its slice of the global batch and computes its rows of everything: embeddings are gathered for objective
    and memory, gradients are summed by DistributedDataParallel while the backward runs, and weights, twin and memory (unless
    sharded) stay the same bits on all ranks. `bytes_moved` is then what one step sent and received, in bytes.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: Config,
        train_size: int,
        mean: tuple,
        std: tuple,
        device: torch.device,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.config, self.device, self.ranks = config, device, ranks
        self.engine = choose_engine(config.optim.engine, device, config.optim.opt, ranks)
        self.encoder = encoder.to(device, memory_format=torch.channels_last).train()
        self.twin = make_twin(self.encoder) if config.memory.encoder_momentum is not None else None
        size = memory_size(config, train_size)
        dtype = torch.bfloat16 if config.memory.memory_dtype == "bf16" else torch.float32
        self.sharded = config.memory.memory_sharded and ranks.is_distributed and size > 0
        share = dict(shard=ranks.rank, num_shards=ranks.world_size) if self.sharded else {}
        self.memory = CrossBatchMemory(size, encoder.embed_dim, dtype, device, **share) if size else None
        self.dtype = resolve_precision(config.model.precision, device)
        # What forward and backward run on: the weights themselves, or bf16 copies of them.
        self.bf16_copies: list[Bf16Copy] = []
        self._student, self._teacher = (self.encoder,), (self.twin,)  # in tuples: no submodules of their own
        if config.model.precision == "bf16-weights":
            self.bf16_copies = [Bf16Copy(model) for model in (self.encoder, self.twin) if model is not None]
            self._student, self._teacher = (self.bf16_copies[0].encoder,), (self.bf16_copies[-1].encoder,)
        self.input = StepInput(mean, std, self.dtype, device)
        self.objective = build_objective(config, encoder.embed_dim, self.dtype, device)
        self.optimizer = build_optimizer(self.encoder.vit, config.optim, capture=self.engine == "graph")
        self.weights = [p for p in self.encoder.parameters() if p.requires_grad]
        self.register_buffer("first_bad_step", torch.full((), -1, dtype=torch.int64, device=device))
        self.register_buffer("sums", torch.zeros(len(LOSS_NAMES), dtype=torch.float64, device=device))
        self.register_buffer("step_number", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.steps_summed = 0
        self.on_phase_end: Callable[[str], None] = lambda phase: None
        self._rate: float | None = None
        self._with_memory = False
        self.bytes_moved = 0
        self._embed, self._embed_keys, self._compare = self._run_encoder, self._run_encoder, self._run_objective
        if self.engine != "eager":
            self._embed, self._embed_keys = compiled(self._run_encoder), compiled(self._run_encoder)
            self._compare = compiled(self._run_objective)
        self.capture = Capture(device, ranks.is_distributed) if self.engine == "graph" else None
        if ranks.is_distributed:
            with self.capture.stream() if self.capture else contextlib.nullcontext():
                self._embed = GradientSync(self._student[0], self._embed, ranks)
            self._compare_all = GlobalLoss(self.objective, ranks)

    def forward(self, batch: Batch) -> None:
        """One step on this rank's slice of a batch: uint8 images (B, S, S, 3), or views of cached ones, with labels (B,), on the device."""
        self.on_phase_end("start")
        config, step = self.config, batch.step
        with_memory = self.memory is not None and step >= config.memory.memory_start
        moved = self.input.copy_batch(batch)
        if self.capture is not None and (moved or with_memory != self._with_memory):
            self.capture.forget()
        self._with_memory = with_memory
        self.step_number.fill_(step)
        rate = learning_rate(step, config.optim)
        if rate != self._rate:
            set_learning_rate(self.optimizer, rate)
            self._rate = rate
        torch.manual_seed(torch_seed(config.run.seed, step, self.ranks.rank))
        whole = len(batch) * self.ranks.world_size
        first, count = self.ranks.batch_slice(whole)
        self._student[0].draw_masks(config.run.seed, step, whole, "student", first, count)
        if self.twin is not None and with_memory:
            self._teacher[0].draw_masks(config.run.seed, step, whole, "twin", first, count)
        if self.capture is None:
            self.body()
        else:
            try:
                self.capture(self.body)
            except CaptureFailed as error:
                if config.optim.engine != "auto":
                    raise
                log.warning("%s: going on without the graph", error)
                self.engine, self.capture.enabled = "compile", False
                self.capture(self.body)
        self.steps_summed += 1

    def release(self) -> None:
        """Let go of the captured graph: NCCL does not end while one holds its communicator."""
        if self.capture is not None:
            torch.cuda.synchronize(self.device)
            self.capture.forget()

    def body(self) -> None:
        """The step on what `forward` put in place: device work only, the same for every step of a run."""
        for weight in self.weights:
            weight.grad = None
        for copy in self.bf16_copies:
            copy.copy_weights()
        before = self.ranks.bytes_moved
        images, labels = self.input.build_images(), self.input.labels
        self.on_phase_end("copy")
        losses, written = (self._global_losses if self.ranks.is_distributed else self._losses)(images, labels)
        self.on_phase_end("objective")
        losses.total.backward()
        if self.bf16_copies:
            self.bf16_copies[0].copy_gradients()
        self.on_phase_end("backward")
        self.bytes_moved = self.ranks.bytes_moved - before

        norm = clip_gradients(self.weights, self.config.optim.clip_grad)
        with torch.no_grad():
            bad = ~(torch.isfinite(losses.total) & torch.isfinite(norm))
            self.first_bad_step.copy_(
                torch.where(bad & (self.first_bad_step < 0), self.step_number, self.first_bad_step)
            )
            hold = self.first_bad_step >= 0
            step_unless(self.optimizer, hold)
            if self.twin is not None:
                momentum_update(self.twin, self.encoder, self.config.memory.encoder_momentum, hold)
            if written is not None:
                self.memory.rollback(written, hold)
            self.sums += torch.stack([*losses, norm]).double()
        self.on_phase_end("optimiser")

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Losses, Replaced | None]:
        """Forward, memory write and objective, where this process is the only rank."""
        embeddings = self._embed(self._student[0], images)
        written, against = None, ()
        if self._with_memory:
            written = self.memory.enqueue(self._keys(embeddings, images), labels)
            # The twin's view of an image is a positive like any other; without a twin, it would be the anchor itself.
            own_slots = written.slots if self.twin is None else None
            against = (self.memory.embeddings, self.memory.labels, own_slots)
        self.on_phase_end("forward")
        return self._compare(embeddings, labels, *against), written

    def _global_losses(self, images: Tensor, labels: Tensor) -> tuple[Losses, Replaced | None]:
        """The same over the batch of all ranks. Labels travel during the forward, embeddings during the twin's."""
        ranks, memory = self.ranks, self.memory
        labels_coming = ranks.gather(labels)
        embeddings = self._embed(self._student[0], images)
        coming = ranks.gather(embeddings)
        keys = None
        if self._with_memory and self.twin is not None:
            keys = ranks.gather(self._keys(embeddings, images)).wait()
        whole, all_labels = coming.wait(), labels_coming.wait()
        written, against = None, None
        if self._with_memory:
            written = memory.enqueue(whole if keys is None else keys, all_labels)
            slots = None
            if self.twin is None:
                first, count = ranks.batch_slice(len(whole))
                slots = memory.local_rows(written.slots) if self.sharded else written.slots[first : first + count]
            against = MemoryShard(memory.embeddings, memory.labels, slots, self.sharded)
        self.on_phase_end("forward")
        return self._compare_all(embeddings, whole, all_labels, against), written

    def _keys(self, embeddings: Tensor, images: Tensor) -> Tensor:
        """What goes into the memory: the twin's embeddings, or without a twin these."""
        if self.twin is None:
            return embeddings.detach()
        with torch.no_grad():
            return self._embed_keys(self._teacher[0], images)

    def _run_encoder(self, encoder: Encoder, images: Tensor) -> Tensor:
        if self.bf16_copies:
            return encoder(images)
        with autocast(self.dtype, self.device):
            return encoder(images)

    def _run_objective(self, *given: Tensor) -> Losses:
        return self.objective(*given)
