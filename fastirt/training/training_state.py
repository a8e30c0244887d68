"""What a checkpoint holds of a training run: saved, and restored on any number of ranks."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional

from fastirt.config.options import Config
from fastirt.config.run_files import RunFiles
from fastirt.config.user_code import portable
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.step.optimizer import load_optimizer, optimizer_state
from fastirt.step.train_step import TrainStep
from fastirt.training import checkpoint
from fastirt.training.saving.snapshot import Snapshot
from fastirt.training.saving.writer import CheckpointWriter, Part

log = logging.getLogger("fastirt")

# May differ between a run and its resumption: they change neither the images nor the arithmetic.
MAY_CHANGE_ON_RESUME = set(
    "output_dir log_dir tracker logging_freq save_freq save_seconds keep resume device num_workers pin_mem max_bad "
    "data_path rank eval_split eval_freq eval_batch_size search weights eval_descriptor engine cache profile "
    "memory_sharded check_freq self_check".split()
)


class TrainingState:
    """Steps done, the best evaluation, the last written checkpoint, tensors of `step_module`."""

    def __init__(self, step_module: TrainStep, config: Config, digest: str, ranks: Ranks) -> None:
        """digest: of the data set, `fastirt.datasets.digest.catalog_digest`."""
        self.step_module, self.config, self.digest, self.ranks = step_module, config, digest, ranks
        self.snapshot, self.writer = Snapshot(), CheckpointWriter(ranks, config.run.save_seconds)
        self.step = 0
        self.best: dict[str, Any] = {}
        self.last_checkpoint: Optional[Path] = None

    def save(self, path: Path, bad: Iterable[int], before_write: Callable[[int], None] = lambda step: None) -> None:
        """Copy the state of this step; the writer's thread writes the copy.

        Called by all ranks.

        bad: rows of the training set that cannot be read.
        before_write: called in this thread once the copies are complete, with the first non-finite
            step of the copied state, or -1; an exception there drops the save.
        Raises UserError where the disk refused the save before; earlier checkpoints are untouched
        then. The writer's `join` raises it for this one.
        """
        self.writer.begin(self._save(path, bad, before_write))

    def _save(self, path: Path, bad: Iterable[int], before_write: Callable[[int], None]) -> Iterator[Part]:
        module, memory, ranks = self.step_module.state_dict(), self.step_module.memory, self.ranks
        slots, shards, place = {}, None, (ranks.rank, ranks.world_size)
        if memory is not None and memory.num_shards > 1:
            slots = {name: module.pop(f"memory.{name}") for name in ("embeddings", "labels")}
            shards = ranks.host.gather_json(checkpoint.shard_entry(path, *place, memory.first, len(slots["labels"])))
        state: dict[str, Any] = {
            "step": self.step,
            "config": self.config.to_dict(),
            "catalog": self.digest,
            "module": module,
            "memory_shards": shards,
            "optimizer": optimizer_state(self.step_module.optimizer),
            "counted": self.step_module.counters.steps_summed,
            "best": self.best,
            "bad": sorted(int(row) for row in bad),
        }
        first_bad, slots, state = self.snapshot.take(
            (module["first_bad_step"], slots, state if ranks.is_main else None),
        )
        if self.snapshot.in_flight:
            yield self.snapshot.wait
        before_write(int(first_bad))
        if memory is not None and shards is not None:
            yield lambda: checkpoint.save_shard(path, *place, memory.first, slots)
        # names all shards, so it comes after them
        yield lambda: checkpoint.save(path, state, self.config.run.keep) if ranks.is_main else None
        self.last_checkpoint = path
        log.info("saved %s", path)

    def load(self, path: Path) -> list[int]:
        """Restore a checkpoint; returns the unreadable rows of the training set.

        Raises UserError where it belongs to another configuration, data set or model.
        """
        state = checkpoint.load(path)
        check_compatible(Config.from_dict(state["config"]), self.config, path)
        if state["catalog"] != self.digest:
            raise UserError(
                f"{path}: was made with another data set (digest {state['catalog'][:12]}, here {self.digest[:12]}): "
                "check --data-path"
            )
        if state["step"] > self.config.optim.max_iter:
            raise UserError(f"{path}: is at step {state['step']}, past --max-iter {self.config.optim.max_iter}")
        try:
            self._reshard_memory(state["module"], state.get("memory_shards"), path)
            self.step_module.load_state_dict(state["module"])
            load_optimizer(self.step_module.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: does not fit this model: {' '.join(str(error).split())[:300]}") from error
        self.step, self.best, self.last_checkpoint = state["step"], state["best"], path
        self.step_module.counters.steps_summed = state["counted"]
        log.info("resumed %s at step %d", path, self.step)
        return state["bad"]

    def delete_newer_checkpoints(self, files: RunFiles) -> None:
        """Of the run's own folder: a run resumed there recomputes those steps."""
        last = self.last_checkpoint
        if last is not None and last.parent.resolve() == files.checkpoints.resolve():
            self.ranks.host.run_on_main(lambda: checkpoint.delete_newer(last))

    def _reshard_memory(self, module: dict[str, Any], shards: Optional[list[dict[str, Any]]], path: Path) -> None:
        """Put this rank's slots of the checkpointed memory (one file or several) into `module`."""
        memory = self.step_module.memory
        if memory is None:
            return
        if shards is not None:
            slots = checkpoint.load_shards(path, shards, memory.first, len(memory))
            module |= {f"memory.{name}": value for name, value in slots.items()}
        elif memory.num_shards > 1:
            for name in ("memory.embeddings", "memory.labels"):
                module[name] = module[name][memory.first : memory.first + len(memory)]


def check_compatible(saved: Config, now: Config, path: Path) -> None:
    """Refuse to resume under another configuration. Raises UserError that names each difference."""
    free = set(MAY_CHANGE_ON_RESUME)
    if saved.data.packed:
        # earlier versions stored it relative
        saved = saved.replace(packed=os.path.abspath(saved.data.packed))
    if now.optim.sched == "constant":
        free.add("max_iter")
    saved, now = _portable(saved), _portable(now)
    different = [line for line in saved.difference(now) if line.split(":")[0] not in free]
    if different:
        raise UserError(
            f"{path}: belongs to another configuration (saved, now): {'; '.join(different)}: "
            f"resume with the saved values, or begin a new run from its weights with --weights {path}"
        )


def _portable(config: Config) -> Config:
    """The configuration with the user's own code by name and digest, wherever its files are."""
    return config.replace(
        dataset=portable(config.data.dataset),
        augment=portable(config.input.augment),
        objective=portable(config.objective.objective),
    )
