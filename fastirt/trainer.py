"""The loop: batches through the step, logs, checkpoints, evaluation, stopping."""

from __future__ import annotations

import fcntl
import json
import logging
from collections import deque
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Optional

import numpy as np
import torch
from tqdm import tqdm

from fastirt import checkpoint
from fastirt.catalog import Catalog
from fastirt.config import Config
from fastirt.encoder import Encoder, save_model
from fastirt.errors import UserError
from fastirt.flops import peak_flops, training_flops
from fastirt.input.cached import CachedTrainLoader, train_loader
from fastirt.input.loader import Batch
from fastirt.input.store import catalog_digest
from fastirt.logs import RunLog, Throughput
from fastirt.optim import learning_rate, load_optimizer, optimizer_state
from fastirt.profiling import Profile
from fastirt.readout import Readout
from fastirt.step import TrainStep
from fastirt.stopping import Interrupted, Stopper

log = logging.getLogger("fastirt")

# May differ between a run and its resumption: they change neither the pictures nor the arithmetic.
FREE_ON_RESUME = set(
    "output_dir log_dir logging_freq save_freq keep resume device num_workers pin_mem max_bad data_path "
    "rank eval_freq eval_batch_size search weights eval_descriptor engine cache profile".split()
)
Evaluate = Callable[[Encoder], dict[str, Any]]


class Trainer:
    """Trains one encoder on one catalogue into one run folder.

    `run` returns the exit code: 0, with the final model's `metrics`, or 128 + signal.
    """

    def __init__(
        self,
        encoder: Encoder,
        catalog: Catalog,
        config: Config,
        folder: Path,
        device: torch.device,
        *,
        mean: tuple,
        std: tuple,
        evaluate: Evaluate,
        store: Any = None,
        resume: Optional[Path] = None,
    ) -> None:
        self.catalog, self.config, self.folder, self.device, self.evaluate = catalog, config, folder, device, evaluate
        self.digest = catalog_digest(catalog)
        self.metrics: dict[str, Any] = {}
        self._lock = _lock(folder)
        self.step_module = TrainStep(encoder, config, len(catalog.train), mean, std, device)
        self.step, self.best, self.store = 0, {}, store
        self.last_good: Optional[Path] = None
        bad: list[int] = []
        if resume is not None:
            bad = self._load(resume)
        self.recent: deque[tuple[int, np.ndarray]] = deque(maxlen=2 * config.run.logging_freq + 8)
        self.loader = train_loader(
            catalog, config, device, start_step=self.step, bad=bad, store=store, csv_path=folder / "bad_pictures.csv"
        )
        self.readout = Readout(self.step_module, device)

    def run(self) -> int:
        """Train to `max_iter`, save the final model, leave the last checkpoint. Raises UserError for a non-finite loss."""
        config, total = self.config, self.config.optim.max_iter
        board = Path(config.run.log_dir) / config.data.dataset if config.run.log_dir else self.folder / "tensorboard"
        # Resumed at a step whose evaluation may not have ended: it is done again.
        redo = self.last_good is not None and (self._due(config.eval.eval_freq) or self.step == total)
        self.log = RunLog(self.folder, board, self.step, total, redo)
        flops = training_flops(self.encoder, self.step_module.twin is not None)
        self.speed = Throughput(config.optim.batch_size, flops, peak_flops(self.device, self.step_module.dtype))
        try:
            with Stopper() as stopper:
                if redo and self.step < total and not self._evaluate(stopper):
                    return self._stop(stopper)
                if self.store is not None and not self._fill_cache(stopper):
                    return self._stop(stopper)
                for batch in self._batches():
                    self.recent.append((batch.step, batch.indices))
                    self.step_module(batch)
                    self.step = batch.step + 1
                    self.speed.tick()
                    self._watch()
                    if self.step % config.run.logging_freq == 0 or self.step == total:
                        self._ask()
                    if stopper.signal is not None:
                        return self._stop(stopper)
                    evaluates = self._due(config.eval.eval_freq)
                    if evaluates or self.step == total or self._due(config.run.save_freq):
                        self.save()
                    if evaluates and not self._evaluate(stopper):
                        return self._stop(stopper)
                save_model(self.encoder, self.folder / "model.safetensors", config)
                if not self._evaluate(stopper):
                    return self._stop(stopper)
        finally:
            self.loader.close()
            self.log.close()
            self._lock.close()
        return 0

    def _batches(self) -> Iterator[Batch]:
        batches = self.speed.waiting(iter(self.loader))
        if self.config.run.profile:
            return Profile(self.config.run.profile, self.step_module, self.folder).follow(batches)
        return batches

    def _fill_cache(self, stopper: Stopper) -> bool:
        """From a packed store all of the cache at once; False where a signal broke it off."""
        if isinstance(self.loader, CachedTrainLoader) and self.step < self.config.optim.max_iter:
            with tqdm(total=len(self.catalog.train), desc="cache", unit="img", disable=None, leave=False) as bar:
                for done in self.loader.fill():
                    bar.update(done - bar.n)
                    if stopper.signal is not None:
                        return False
        return True

    @property
    def encoder(self) -> Encoder:
        return self.step_module.encoder

    def save(self) -> Path:
        """Write a checkpoint of the present step; refuses to save past a non-finite one."""
        self._report(wait=True)
        self._check(self.readout.first_bad_step(wait=True))
        path = self.folder / "checkpoints" / f"step_{self.step:08d}.safetensors"
        state = {
            "step": self.step,
            "config": self.config.to_dict(),
            "catalog": self.digest,
            "module": self.step_module.state_dict(),
            "optimizer": optimizer_state(self.step_module.optimizer),
            "counted": self.step_module.counted,
            "best": self.best,
            "bad": sorted(int(i) for i in self.loader.bad),
        }
        checkpoint.save(path, state, self.config.run.keep)
        self.last_good = path
        return path

    def _load(self, path: Path) -> list[int]:
        """Restore everything from a checkpoint; returns the bad pictures. Raises UserError where it belongs to another run."""
        state = checkpoint.load(path)
        compatible(Config.from_dict(state["config"]), self.config, path)
        if state["catalog"] != self.digest:
            raise UserError(
                f"{path}: was made with another data set (digest {state['catalog'][:12]}, here {self.digest[:12]}): check --data-path"
            )
        if state["step"] > self.config.optim.max_iter:
            raise UserError(f"{path}: is at step {state['step']}, past --max-iter {self.config.optim.max_iter}")
        try:
            self.step_module.load_state_dict(state["module"])
            load_optimizer(self.step_module.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: does not fit this model: {' '.join(str(error).split())[:300]}") from error
        self.step, self.best, self.last_good = state["step"], state["best"], path
        if path.parent.resolve() == (self.folder / "checkpoints").resolve():
            checkpoint.forget_later(path)
        self.step_module.counted = state["counted"]
        log.info("resumed %s at step %d", path, self.step)
        return state["bad"]

    def _stop(self, stopper: Stopper) -> int:
        path = (
            self.save() if self.last_good is None or self.last_good.stem != f"step_{self.step:08d}" else self.last_good
        )
        log.warning("stopped by signal %d at step %d; saved %s: go on with --resume", stopper.signal, self.step, path)
        return stopper.exit_code

    def _due(self, frequency: int) -> bool:
        return bool(frequency) and self.step % frequency == 0 and self.step < self.config.optim.max_iter

    def _evaluate(self, stopper: Stopper) -> bool:
        """Measure the model of this step, keep it where it is the best so far; False where a signal broke it off."""
        try:
            with stopper.interruptible():
                metrics = self.evaluate(self.encoder)
        except Interrupted:
            return False
        self.metrics = metrics
        self.log.row({"step": self.step, **metrics})
        name = next(name for name in metrics if name.startswith("recall@"))
        if metrics[name] > self.best.get(name, -1.0):
            self.best = {"step": self.step, name: metrics[name]}
            if self.config.eval.eval_freq:
                save_model(self.encoder, self.folder / "model_best.safetensors", self.config)
        now, best = 100 * metrics[name], 100 * self.best[name]
        log.info("step %d: %s %.2f %% (best %.2f %% at step %d)", self.step, name, now, best, self.best["step"])
        self.speed.read(0)
        return True

    def _watch(self) -> None:
        """Act on what the device has said so far, without waiting for it."""
        self._check(self.readout.first_bad_step())
        self._report(wait=False)
        self.log.bar.update(self.step - self.log.bar.n)

    def _check(self, first_bad: int) -> None:
        if first_bad < 0:
            return
        rows = dict(self.recent).get(first_bad, np.array([], dtype=np.int64))
        paths = [self.catalog.train.paths[i] for i in rows]
        report = self.folder / "non_finite.json"
        report.write_text(json.dumps({"step": first_bad + 1, "pictures": paths}, indent=1))
        last = f"last good checkpoint: {self.last_good}" if self.last_good else "no checkpoint was saved before it"
        raise UserError(
            f"non-finite loss or gradient first in step {first_bad + 1}, no update since; its pictures: {', '.join(paths[:3])}"
            f"{f' and {len(paths) - 3} more' if len(paths) > 3 else ''} (all in {report}); {last}; "
            "try a lower --lr, --clip-grad, or --precision fp32"
        )

    def _ask(self) -> None:
        """Begin a log row; it is written when its numbers have arrived."""
        self._report(wait=True)
        speed = self.speed.read(self.config.optim.max_iter - self.step)
        lr = learning_rate(self.step - 1, self.config.optim)
        self.readout.ask({"step": self.step, "lr": lr, **speed})
        self._report(wait=self.step == self.config.optim.max_iter)

    def _report(self, wait: bool) -> None:
        row = self.readout.answer(wait)
        if row is not None:
            self.log.losses(row, self.config.objective.lambda_reg)


def compatible(saved: Config, now: Config, path: Path) -> None:
    """Refuse to resume under another configuration, naming each difference."""
    free = set(FREE_ON_RESUME)
    if now.optim.sched == "constant":
        free.add("max_iter")
    different = [line for line in saved.difference(now) if line.split(":")[0] not in free]
    if different:
        raise UserError(f"{path}: belongs to another configuration (saved, now): {'; '.join(different)}")


def _lock(folder: Path) -> IO[str]:
    """Hold the run's folder until the process ends. Raises UserError where another process trains in it."""
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"{folder}: another process is training in it: wait for it, or choose another --output-dir"
        ) from None
    return file
