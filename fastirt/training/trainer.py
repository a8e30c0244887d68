"""The loop: batches through the step, logs, checkpoints, evaluation, stopping."""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Optional

import numpy as np
import torch
from tqdm import tqdm

from fastirt.config.options import Config
from fastirt.datasets import Catalog
from fastirt.datasets.digest import catalog_digest
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError
from fastirt.loading.batch import Batch
from fastirt.loading.cached_images import CachedImages
from fastirt.loading.train_loader import train_loader
from fastirt.model.encoder import Encoder
from fastirt.model.flops import peak_flops, training_flops
from fastirt.model.save import save_model
from fastirt.step.async_metrics import AsyncMetrics
from fastirt.step.optimizer import learning_rate, load_optimizer, optimizer_state
from fastirt.step.train_step import build_train_step
from fastirt.training import checkpoint
from fastirt.training.consistency import check_ranks_in_sync
from fastirt.training.profiler import Profile
from fastirt.training.resume import compatible
from fastirt.training.run_folder import _lock
from fastirt.training.run_log import NoLog, RunLog
from fastirt.training.signals import Interrupted, StopSignal
from fastirt.training.throughput import Throughput

log = logging.getLogger("fastirt")

NON_FINITE = 1000  # what a rank tells the others instead of a signal
Evaluate = Callable[[Encoder], dict[str, Any]]


class Trainer:
    """Trains one encoder on one catalogue into one run folder.

    `run` returns the exit code: 0, with the final model's `metrics`, or 128 + signal. evaluate: measures an encoder;
    None where there is nothing to measure it on, and then `metrics` stays empty.
    """

    def __init__(
        self,
        encoder: Encoder,
        catalog: Catalog,
        config: Config,
        folder: Path,
        device: torch.device,
        *,
        evaluate: Optional[Evaluate],
        store: Any = None,
        resume: Optional[Path] = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.catalog, self.config, self.folder, self.device, self.evaluate = catalog, config, folder, device, evaluate
        self.ranks = ranks
        self.digest = catalog_digest(catalog)
        self.metrics: dict[str, Any] = {}
        self._lock: Optional[IO[str]] = None
        ranks.host.run_on_main(self._take_lock)
        self.step_module = build_train_step(encoder, config, len(catalog.train), device, ranks)
        self.best: dict[str, Any] = {}
        self.step, self.store = 0, store
        self.last_good: Optional[Path] = None
        bad: list[int] = []
        if resume is not None:
            bad = self._load(resume)
        self.recent: deque[tuple[int, np.ndarray]] = deque(
            maxlen=2 * max(config.run.logging_freq, ranks.host.stop_check_interval) + 8
        )
        self.loader = train_loader(
            catalog,
            config,
            device,
            start_step=self.step,
            bad=bad,
            store=store,
            csv_path=folder / "bad_pictures.csv",
            ranks=ranks,
        )
        self.async_metrics = AsyncMetrics(self.step_module.counters)
        self._first_bad = -1

    def run(self) -> int:
        """Train to `max_iter`, save the final model, leave the last checkpoint. Raises UserError for a non-finite loss."""
        config, total = self.config, self.config.optim.max_iter
        board = Path(config.run.log_dir) / config.data.dataset if config.run.log_dir else self.folder / "tensorboard"
        # Resumed at a step whose evaluation may not have ended: it is done again.
        redo = self.last_good is not None and (self._due(config.eval.eval_freq) or self.step == total)
        self.log: RunLog | NoLog = NoLog()
        self.ranks.host.run_on_main(lambda: self._open_log(board, redo))
        flops = training_flops(self.encoder, self.step_module.networks.momentum_encoder is not None)
        peak = peak_flops(self.device, self.step_module.networks.dtype) * self.ranks.world_size
        self.speed = Throughput(config.optim.batch_size, flops, peak, self.device)
        with StopSignal(ignore_repeats=self.ranks.has_agent) as stopper:
            try:
                return self._train(stopper, redo)
            finally:
                self.loader.close()
                self.log.close()
                if self._lock is not None:
                    self._lock.close()

    def _train(self, stopper: StopSignal, redo: bool) -> int:
        config, total = self.config, self.config.optim.max_iter
        if redo and self.step < total and not self._evaluate(stopper):
            return self._stop(stopper)
        if self.store is not None and not self._fill_cache(stopper):
            return self._stop(stopper)
        for batch in self._batches():
            self.recent.append((batch.step, batch.indices if batch.whole is None else batch.whole))
            self.step_module(batch)
            self.step = batch.step + 1
            self.speed.tick()
            self._poll_device()
            if self.step % config.run.logging_freq == 0 or self.step == total:
                self._start_log_row()
            if self._told_to_stop(stopper):
                return self._stop(stopper)
            if self._due(config.run.check_freq):
                check_ranks_in_sync(self.ranks, self.step_module, self.step)
            evaluates = self._due(config.eval.eval_freq)
            if evaluates or self.step == total or self._due(config.run.save_freq):
                self.save()
            if evaluates and not self._evaluate(stopper):
                return self._stop(stopper)
        if self.ranks.is_main:
            save_model(self.encoder, self.folder / "model.safetensors", config)
        if not self._evaluate(stopper):
            return self._stop(stopper)
        self.step_module.engine.release()
        return 0

    def _take_lock(self) -> None:
        self._lock = _lock(self.folder)

    def _open_log(self, board: Path, redo: bool) -> None:
        self.log = RunLog(self.folder, board, self.step, self.config.optim.max_iter, redo)

    def _batches(self) -> Iterator[Batch]:
        batches = self.speed.waiting(iter(self.loader))
        if self.config.run.profile:
            return Profile(self.config.run.profile, self.step_module, self.folder, logs=self.ranks.is_main).follow(
                batches
            )
        return batches

    def _fill_cache(self, stopper: StopSignal) -> bool:
        """From a packed store all of the cache at once; False where a signal broke it off."""
        images = self.loader.images
        if isinstance(images, CachedImages) and self.step < self.config.optim.max_iter:
            quiet = None if self.ranks.is_main else True
            with tqdm(total=len(self.catalog.train), desc="cache", unit="img", disable=quiet, leave=False) as bar:
                for done in images.fill(self.step):
                    bar.update(done - bar.n)
                    if self._told_to_stop(stopper):
                        return False
        return True

    @property
    def encoder(self) -> Encoder:
        return self.step_module.encoder

    def save(self) -> Path:
        """Write a checkpoint of the present step; refuses to save past a non-finite one, or one at which ranks differ."""
        self.ranks.host.barrier()  # detects a lost rank on the host; synchronizing the device first would hang in its collective
        self._finish_log_row(wait=True)
        self._check(self.async_metrics.first_bad_step(wait=True))
        check_ranks_in_sync(self.ranks, self.step_module, self.step)
        path = self.folder / "checkpoints" / f"step_{self.step:08d}.safetensors"
        module, shards = self.step_module.state_dict(), None
        ring = self.step_module.memory
        if ring is not None and ring.num_shards > 1:
            slots = {name: module.pop(f"memory.{name}") for name in ("embeddings", "labels")}
            written = checkpoint.save_shard(path, self.ranks.rank, self.ranks.world_size, ring.first, slots)
            shards = self.ranks.host.gather_json(written)
        state = {
            "step": self.step,
            "config": self.config.to_dict(),
            "catalog": self.digest,
            "module": module,
            "memory_shards": shards,
            "optimizer": optimizer_state(self.step_module.optimizer),
            "counted": self.step_module.counters.steps_summed,
            "best": self.best,
            "bad": sorted(int(i) for i in self.loader.bad),
        }
        self.ranks.host.run_on_main(lambda: checkpoint.save(path, state, self.config.run.keep))
        self.last_good = path
        return path

    def _load(self, path: Path) -> list[int]:
        """Restore everything from a checkpoint; returns the bad images. Raises UserError where it belongs to another run."""
        state = checkpoint.load(path)
        compatible(Config.from_dict(state["config"]), self.config, path)
        if state["catalog"] != self.digest:
            raise UserError(
                f"{path}: was made with another data set (digest {state['catalog'][:12]}, here {self.digest[:12]}): check --data-path"
            )
        if state["step"] > self.config.optim.max_iter:
            raise UserError(f"{path}: is at step {state['step']}, past --max-iter {self.config.optim.max_iter}")
        try:
            self._load_memory(state["module"], state.get("memory_shards"), path)
            self.step_module.load_state_dict(state["module"])
            load_optimizer(self.step_module.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: does not fit this model: {' '.join(str(error).split())[:300]}") from error
        self.step, self.best, self.last_good = state["step"], state["best"], path
        if path.parent.resolve() == (self.folder / "checkpoints").resolve():
            self.ranks.host.run_on_main(lambda: checkpoint.delete_newer(path))
        self.step_module.counters.steps_summed = state["counted"]
        log.info("resumed %s at step %d", path, self.step)
        return state["bad"]

    def _load_memory(self, module: dict[str, Any], shards: Optional[list[dict[str, Any]]], path: Path) -> None:
        """Re-shard the memory of a checkpoint (one file or several) to this rank's slots."""
        ring = self.step_module.memory
        if ring is None:
            return
        if shards is not None:
            found = checkpoint.load_shards(path, shards, ring.first, len(ring))
            module |= {f"memory.{name}": value for name, value in found.items()}
        elif ring.num_shards > 1:
            for name in ("memory.embeddings", "memory.labels"):
                module[name] = module[name][ring.first : ring.first + len(ring)]

    def _told_to_stop(self, stopper: StopSignal) -> bool:
        """True once any rank got a stop signal or a non-finite loss; all ranks return True at the same step."""
        signal = self.ranks.host.poll_stop_signal(NON_FINITE if self._first_bad >= 0 else stopper.signal or 0)
        if signal == NON_FINITE:
            self._check(self.async_metrics.first_bad_step(wait=True))
        if signal:
            stopper.signal = signal
        return bool(signal)

    def _stop(self, stopper: StopSignal) -> int:
        """Leave a checkpoint of this step, and say so; the exit code."""
        saved = self.last_good is not None and self.last_good.stem == f"step_{self.step:08d}"
        path = self.last_good if saved else self.save()
        if self.ranks.is_main:
            log.warning(
                "stopped by signal %d at step %d; saved %s: go on with --resume", stopper.signal, self.step, path
            )
        return stopper.exit_code

    def _due(self, frequency: int) -> bool:
        return bool(frequency) and self.step % frequency == 0 and self.step < self.config.optim.max_iter

    def _evaluate(self, stopper: StopSignal) -> bool:
        """Measure the model of this step, keep it where it is the best so far; False where a signal broke it off."""
        if self.evaluate is None:
            return True
        try:
            with stopper.interruptible():
                metrics = self.evaluate(self.encoder)
        except Interrupted:
            return False
        except RuntimeError as error:  # the others were interrupted first
            if stopper.signal is None or self.ranks.as_peer_lost(error) is None:
                raise
            return False
        self.metrics = metrics
        self.log.row({"step": self.step, **metrics})
        name = next(iter(metrics))  # the first Recall@K, or MAP@R where too few images are left for any K
        if metrics[name] > self.best.get(name, -1.0):
            self.best = {"step": self.step, name: metrics[name]}
            if self.config.eval.eval_freq and self.ranks.is_main:
                save_model(self.encoder, self.folder / "model_best.safetensors", self.config)
        now, best = 100 * metrics[name], 100 * self.best[name]
        log.info("step %d: %s %.2f %% (best %.2f %% at step %d)", self.step, name, now, best, self.best["step"])
        self.speed.read(0)
        return True

    def _poll_device(self) -> None:
        """Poll device flags and metrics without synchronizing."""
        self._first_bad = self.async_metrics.first_bad_step()
        if not self.ranks.is_distributed:  # many ranks hear of it at different steps: see `_told_to_stop`
            self._check(self._first_bad)
        self._finish_log_row(wait=False)
        self.log.bar.update(self.step - self.log.bar.n)

    def _check(self, first_bad: int) -> None:
        if first_bad < 0:
            return
        rows = dict(self.recent).get(first_bad, np.array([], dtype=np.int64))
        paths = [self.catalog.train.paths[i] for i in rows]
        report = self.folder / "non_finite.json"
        if self.ranks.is_main:
            report.write_text(json.dumps({"step": first_bad + 1, "pictures": paths}, indent=1))
        last = f"last good checkpoint: {self.last_good}" if self.last_good else "no checkpoint was saved before it"
        raise self.ranks.shared_error(
            f"non-finite loss or gradient first in step {first_bad + 1}, no update since; its images: {', '.join(paths[:3])}"
            f"{f' and {len(paths) - 3} more' if len(paths) > 3 else ''} (all in {report}); {last}; "
            "try a lower --lr, --clip-grad, or --precision fp32"
        )

    def _start_log_row(self) -> None:
        """Start the asynchronous copy of the metrics; the row is written when it completes."""
        self._finish_log_row(wait=True)
        self._speed = self.speed.read(self.config.optim.max_iter - self.step)
        lr = learning_rate(self.step - 1, self.config.optim)
        wire = {"wire_mb": round(self.step_module.bytes_moved / 1e6, 3)} if self.ranks.is_distributed else {}
        self.async_metrics.request({"step": self.step, "lr": lr, **wire})
        self._finish_log_row(wait=self.step == self.config.optim.max_iter)

    def _finish_log_row(self, wait: bool) -> None:
        row = self.async_metrics.poll(wait)
        if row is not None:
            self.log.losses({**row, **self._speed()}, self.config.objective.lambda_reg)
