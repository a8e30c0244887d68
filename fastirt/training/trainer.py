"""The loop: batches through the step, logs, checkpoints, evaluation, stopping."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch

from fastirt.config.options import Config
from fastirt.config.run_files import RunFiles
from fastirt.datasets import Catalog
from fastirt.datasets.digest import catalog_digest
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.loading.batch import Batch
from fastirt.loading.cached_images import CachedImages
from fastirt.loading.image_cache import ImageCache
from fastirt.loading.train_loader import train_loader
from fastirt.model.encoder import Encoder
from fastirt.model.flops import peak_flops, training_flops
from fastirt.model.save import save_model
from fastirt.step.async_metrics import AsyncMetrics
from fastirt.step.optimizer import learning_rate
from fastirt.step.train_step import build_train_step
from fastirt.training.health_checks import NonFiniteWatch, check_ranks_in_sync
from fastirt.training.profiler import Profile
from fastirt.training.run_log import NoLog, RunLog
from fastirt.training.signals import Interrupted, StopSignal
from fastirt.training.throughput import Throughput
from fastirt.training.trackers import TrackedRun
from fastirt.training.training_state import TrainingState

log = logging.getLogger("fastirt")

NON_FINITE = 1000  # sent to the other ranks in the place of a signal's number
Evaluate = Callable[[Encoder], dict[str, Any]]


class Trainer:
    """Trains one encoder on one catalogue into one run folder.

    `run` returns the exit code: 0, with the final model's `metrics`, or 128 + signal.

    encoder: trained in place.
    evaluate: measures an encoder; None without an evaluation split, and `metrics` stays empty.
    source: of the training images, from a packed store; None reads the files.
    resume: a checkpoint; raises UserError where it belongs to another run.
    cache: of an earlier run on the same images with the same preprocessing.
    ranks: all of them construct and run a trainer.
    """

    def __init__(
        self,
        encoder: Encoder,
        catalog: Catalog,
        config: Config,
        files: RunFiles,
        *,
        evaluate: Optional[Evaluate],
        source: Any = None,
        resume: Optional[Path] = None,
        cache: Optional[ImageCache] = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        device = torch.device(config.run.device)
        self.config, self.files, self.evaluate, self.ranks = config, files, evaluate, ranks
        self.metrics: dict[str, Any] = {}
        self.step_module = build_train_step(encoder, config, len(catalog.train), device, ranks)
        self.state = TrainingState(self.step_module, config, catalog_digest(catalog), ranks)
        bad = self.state.load(resume) if resume is not None else []
        self.state.delete_newer_checkpoints(files)
        first, report = self.state.step, files.bad_images
        self.loader = train_loader(
            catalog, config, device, start_step=first, bad=bad, store=source, csv_path=report, cache=cache, ranks=ranks
        )
        self.fills_at_once = source is not None and device.type == "cuda"
        self.async_metrics = AsyncMetrics(self.step_module.counters)
        self.non_finite = NonFiniteWatch(self.async_metrics, catalog, self.state, files, ranks)
        self.log: RunLog | NoLog = NoLog()
        flops = training_flops(encoder, self.step_module.networks.momentum_encoder is not None)
        peak = peak_flops(device, self.step_module.networks.dtype)
        self.speed = Throughput(config.optim.batch_size, flops, peak and peak * ranks.world_size, device)

    def run(self) -> int:
        """Train to `max_iter` and save the final model. Raises UserError for a non-finite loss."""
        last = self.state.last_checkpoint
        # Resumed at a step whose evaluation may not have ended: it is done again.
        redo = last is not None and (self._due(self.config.eval.eval_freq) or self.state.step == self.total)
        self.ranks.host.run_on_main(lambda: self._open_log(redo))
        self.speed.read(0)  # the first row's speed does not count what came before
        with StopSignal(ignore_repeats=self.ranks.has_agent) as stopper:
            with contextlib.closing(self.log), contextlib.closing(self.loader), self.state.writer:
                finished = self._train(stopper, redo)
                return 0 if finished else self._stop(stopper)

    def _train(self, stopper: StopSignal, redo: bool) -> bool:
        """False where a signal ended the training."""
        config, state = self.config, self.state
        if redo and state.step < self.total and not self._evaluate(stopper):
            return False
        if self.fills_at_once and not self._fill_cache(stopper):
            return False
        for batch in self._batches():
            self.non_finite.remember(batch)
            self.step_module(batch)
            state.step = batch.step + 1
            self.speed.tick()
            self.non_finite.poll()
            self._finish_log_row(wait=False)
            self.log.bar.update(state.step - self.log.bar.n)
            if state.step % config.run.logging_freq == 0 or state.step == self.total:
                self._start_log_row()
            if self._must_stop(stopper):
                return False
            if self._due(config.run.check_freq):
                check_ranks_in_sync(self.ranks, self.step_module, state.step)
            evaluates = self._due(config.eval.eval_freq)
            if evaluates or state.step == self.total or self._due(config.run.save_freq) or state.writer.due:
                self.save()
            if evaluates and not self._evaluate(stopper):
                return False
        state.writer.join()
        if self.ranks.is_main:
            save_model(self.encoder, self.files.final_model, config)
        if not self._evaluate(stopper):
            return False
        self.log.finish(self.metrics)
        self.step_module.engine.release()
        return True

    @property
    def encoder(self) -> Encoder:
        return self.step_module.encoder

    @property
    def total(self) -> int:
        return self.config.optim.max_iter

    def _open_log(self, redo: bool) -> None:
        self.log = RunLog(TrackedRun(self.files, self.config, self.state.step), redo)

    def _batches(self) -> Iterator[Batch]:
        batches, steps = self.speed.waiting(iter(self.loader)), self.config.run.profile
        if not steps:
            return batches
        return Profile(steps, self.step_module, self.files.path, logs=self.ranks.is_main).follow(batches)

    def _fill_cache(self, stopper: StopSignal) -> bool:
        """Read all of a packed store into the cache; False where a signal interrupted it."""
        images = self.loader.images
        if not isinstance(images, CachedImages) or self.state.step == self.total:
            return True
        return not any(self._must_stop(stopper) for _ in images.fill(self.state.step, bar=self.ranks.is_main))

    def save(self) -> None:
        """Begin a checkpoint of this step, once the one before is written. A single rank does not
        wait for the device.

        Raises UserError where the one before could not be written, where a step was non-finite, or
        where ranks differ.
        """
        self.state.writer.join()
        if self.ranks.is_distributed:
            # Detects a lost rank on the host; synchronizing the device first would hang in its
            # collective.
            self.ranks.host.barrier()
            self.non_finite.check()
            check_ranks_in_sync(self.ranks, self.step_module, self.state.step)
        self.state.save(self.files.checkpoint(self.state.step), self.loader.bad, self._before_write)

    def _before_write(self, first_bad_step: int) -> None:
        """What comes before the file of a checkpoint, once the device has passed its step."""
        # resuming does not repeat this row; without waiting, since a later row may be on its way
        self._finish_log_row(wait=False)
        self.non_finite.check(first_bad_step)

    def _must_stop(self, stopper: StopSignal) -> bool:
        """True once any rank got a stop signal or a bad loss; all ranks agree on the step."""
        own = NON_FINITE if self.non_finite.first_bad_step >= 0 else stopper.signal or 0
        # zeros at a step without an exchange: no signal, no save due, no part of a save ended
        signal, *saves = self.ranks.host.poll((own, *self.state.writer.status())) or (0, 0, 0)
        if signal == NON_FINITE:
            self.non_finite.check()
        if signal:
            stopper.signal = signal
        self.state.writer.heed(*saves)
        return bool(signal)

    def _stop(self, stopper: StopSignal) -> int:
        """Leave a checkpoint of this step and log it; returns the exit code."""
        state = self.state
        if state.last_checkpoint is None or state.last_checkpoint.stem != f"step_{state.step:08d}":
            self.save()
            state.writer.join()
        if self.ranks.is_main:
            stopped = (stopper.signal, state.step, state.last_checkpoint)
            log.warning("stopped by signal %d at step %d; saved %s: go on with --resume", *stopped)
        return stopper.exit_code

    def _due(self, frequency: int) -> bool:
        return bool(frequency) and self.state.step % frequency == 0 and self.state.step < self.total

    def _evaluate(self, stopper: StopSignal) -> bool:
        """Measure the model and keep it if it is the best; False where a signal interrupted it."""
        if self.evaluate is None:
            return True
        self.state.writer.join()
        try:
            with stopper.interruptible():
                metrics = self.evaluate(self.encoder)
        except Interrupted:
            return False
        except RuntimeError as error:  # the other ranks were interrupted first
            if stopper.signal is None or self.ranks.as_peer_lost(error) is None:
                raise
            return False
        state, self.metrics = self.state, metrics
        self.log.row({"step": state.step, **metrics})
        name = next(iter(metrics))  # the first Recall@K, or MAP@R where too few images are left for any K
        if metrics[name] > state.best.get(name, -1.0):
            state.best = {"step": state.step, name: metrics[name]}
            if self.config.eval.eval_freq and self.ranks.is_main:
                save_model(self.encoder, self.files.best_model, self.config)
        now, best = 100 * metrics[name], 100 * state.best[name]
        log.info("step %d: %s %.2f %% (best %.2f %% at step %d)", state.step, name, now, best, state.best["step"])
        self.speed.read(0)
        state.writer.restart_clock()
        return True

    def _start_log_row(self) -> None:
        """Start the asynchronous copy of the metrics; the row is written when it completes."""
        is_last, host = self.state.step == self.total, self.ranks.host
        if is_last or self.config.run.logging_freq <= 2 * host.poll_interval:
            host.barrier()  # else a rank that has died since the last exchange leaves the device waiting
        self._finish_log_row(wait=True)
        step, megabytes = self.state.step, round(self.step_module.bytes_moved / 1e6, 3)
        wire = {"wire_mb": megabytes} if self.ranks.is_distributed else {}
        row = {"step": step, "lr": learning_rate(step - 1, self.config.optim), **wire}
        self.async_metrics.request(row, self.speed.read(self.total - step))
        self._finish_log_row(wait=is_last)

    def _finish_log_row(self, wait: bool) -> None:
        row = self.async_metrics.poll(wait)
        if row is not None:
            self.log.losses(row, self.config.objective.lambda_reg)
