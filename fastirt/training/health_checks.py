"""Checks at the start and while training: ranks alike and in sync, losses finite."""

from __future__ import annotations

import functools
import json
from collections import Counter, deque
from pathlib import Path
from typing import Any, Iterable, NoReturn, Optional

import numpy as np
import torch
from torch import Tensor

import fastirt.kernels
from fastirt.config.options import Config, flatten
from fastirt.config.run_files import RunFiles
from fastirt.config.user_code import portable
from fastirt.datasets import Catalog
from fastirt.datasets.digest import catalog_digest
from fastirt.distributed.ranks import Ranks
from fastirt.kernels.passes import self_check
from fastirt.loading.batch import Batch
from fastirt.model.encoder import Encoder
from fastirt.step.async_metrics import AsyncMetrics
from fastirt.step.train_step import TrainStep
from fastirt.training.training_state import TrainingState

CHUNK = 2**22  # numbers summed at once: 32 MiB as int64
PER_RANK_OPTIONS = {
    "device",
    "num_workers",
    "data_path",
    "packed",
    "log_dir",
    "weights",
}  # options that may differ between ranks


def check_same_setup(ranks: Ranks, config: Config, catalog: Catalog, encoder: Encoder) -> None:
    """Raises UserError on all ranks, naming the difference, where they would not train the same
    model on the same data.
    """
    if not ranks.is_distributed:
        return
    settings = {f"--{name.replace('_', '-')}": value for name, value in flatten(config.to_dict()).items()}
    for name in ("--dataset", "--augment", "--objective"):  # a user's files may lie elsewhere
        settings[name] = portable(settings[name])
    own: dict[str, Any] = {
        name: v for name, v in settings.items() if name.strip("-").replace("-", "_") not in PER_RANK_OPTIONS
    }
    own |= {
        "version of torch": torch.__version__,
        "code of fastirt": code_digest()[:12],
        "data set": catalog_digest(catalog)[:12],
    }
    own["weights"] = f"{int(checksum(encoder.state_dict().values())) % 2**64:016x}"
    everyone = ranks.host.gather_json({name: str(value) for name, value in own.items()})
    for rank, other in enumerate(everyone):
        different = [
            f"{name} ({other.get(name)} instead of {value})"
            for name, value in everyone[0].items()
            if other.get(name) != value
        ]
        if different:
            raise ranks.shared_error(
                f"rank {rank} differs from rank 0 in {', '.join(different)}: start all ranks alike"
            )


def check_ranks_in_sync(ranks: Ranks, step_module: TrainStep, step: int) -> None:
    """Raises UserError on all ranks where weights, momentum encoder or memory of one rank differ in
    any bit. Waits for the device.
    """
    if not ranks.is_distributed:
        return
    held: dict[str, Iterable[Tensor]] = {"weights": step_module.encoder.state_dict().values()}
    if (keys := step_module.networks.momentum_encoder) is not None:
        held["momentum encoder"] = keys.state_dict().values()
    if step_module.memory is not None:
        tensors = step_module.memory.state_dict()
        held["memory"] = [tensors["pointer"]] if step_module.memory.num_shards > 1 else tensors.values()
    # Detects a lost rank on the host; synchronizing the device first would hang in its collective.
    ranks.host.barrier()
    own = {name: int(checksum(tensors)) for name, tensors in held.items()}
    everyone = ranks.host.gather_json(own)
    for name in own:
        # of two ranks: rank 0's
        most = Counter(other[name] for other in everyone).most_common(1)[0][0]
        for rank, other in enumerate(everyone):
            if other[name] != most:
                raise ranks.shared_error(
                    f"step {step}: {name} of rank {rank} no longer equal those of the others "
                    "(a fault of memory, GPU or network?): "
                    "nothing was saved since; go on from the last checkpoint with --resume"
                )


class NonFiniteWatch:
    """Ends the run after a non-finite loss or gradient, naming its step and images.

    `first_bad_step`: as far as the host knows, or -1.
    """

    def __init__(
        self, metrics: AsyncMetrics, catalog: Catalog, state: TrainingState, files: RunFiles, ranks: Ranks
    ) -> None:
        self.metrics, self.catalog, self.state, self.files, self.ranks = metrics, catalog, state, files, ranks
        self.first_bad_step = -1
        run = state.config.run
        # The host reads the flag one log row or one exchange of stop signals late: keep rows that
        # long.
        kept = 2 * max(run.logging_freq, ranks.host.poll_interval) + 8
        self._recent: deque[tuple[int, np.ndarray]] = deque(maxlen=kept)

    def remember(self, batch: Batch) -> None:
        self._recent.append((batch.step, batch.indices if batch.whole is None else batch.whole))

    def poll(self) -> None:
        """Read the flag without waiting.

        A single rank raises; many raise at the same step, in `check`.
        """
        self.first_bad_step = self.metrics.first_bad_step()
        if self.first_bad_step >= 0 and not self.ranks.is_distributed:
            self.check(self.first_bad_step)

    def check(self, first_bad_step: Optional[int] = None) -> None:
        """Called by all ranks. Raises UserError on all where a step was non-finite.

        first_bad_step: as the device has told it; None waits for the device.
        """
        if first_bad_step is None:
            first_bad_step = self.metrics.first_bad_step(wait=True)
        self.first_bad_step = first_bad_step
        try:
            self.state.writer.join()  # the message names the last checkpoint
        finally:
            if first_bad_step >= 0:  # rather than the error of a disk
                self._raise(first_bad_step)

    def _raise(self, step: int) -> NoReturn:
        rows = dict(self._recent).get(step, np.array([], dtype=np.int64))
        paths, last = [self.catalog.train.paths[row] for row in rows], self.state.last_checkpoint
        if self.ranks.is_main:
            self.files.non_finite.write_text(json.dumps({"step": step + 1, "pictures": paths}, indent=1))
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        raise self.ranks.shared_error(
            f"non-finite loss or gradient first in step {step + 1}, no update since; "
            f"its images: {', '.join(paths[:3])}{more} (all in {self.files.non_finite}); "
            f"{f'last good checkpoint: {last}' if last else 'no checkpoint was saved before it'}; "
            "try a lower --lr, --clip-grad, or --precision fp32"
        )


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """0-d int64 on the device: the sum of bit patterns, each weighted by its row, so that the order
    of rows counts. One pass, in chunks.
    """
    total = None
    for number, tensor in enumerate(tensors):
        rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach().reshape(-1, 1)
        bits = rows.contiguous().view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
        )
        for first in range(0, len(bits), at_once := max(1, CHUNK // max(1, bits.shape[1]))):
            sums = bits[first : first + at_once].sum(1, dtype=torch.int64)
            places = torch.arange(first, first + len(sums), device=sums.device)
            part = (sums * (2 * places + 1)).sum() * (2 * number + 1)
            total = part if total is None else total + part.to(total.device)
    return torch.zeros((), dtype=torch.int64) if total is None else total


@functools.cache
def code_digest() -> str:
    """SHA-256 of the package's own Python files."""
    return self_check.code_digest(*(Path(package.__file__).parent for package in (fastirt, fastirt.kernels)))
