"""What a tracker is: it gets the configuration, the rows of log.jsonl and the final metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, NamedTuple, Protocol

from fastirt.config.options import Config
from fastirt.config.run_files import RunFiles

Row = Mapping[str, Any]


class TrackedRun(NamedTuple):
    """The run that a tracker writes down."""

    files: RunFiles
    config: Config
    step: int  # done before: above 0 the run is resumed

    @property
    def name(self) -> str:
        return self.files.path.name

    @property
    def tensorboard(self) -> Path:
        """`--log-dir`, or a folder of the run."""
        log_dir = self.config.run.log_dir
        return Path(log_dir) / self.config.data.name if log_dir else self.files.tensorboard


class Tracker(Protocol):
    """Writes a run somewhere else than into log.jsonl.

    All calls come from one thread. Whatever they raise ends this tracker alone, never the run.
    """

    def start(self) -> None:
        """Open the tracker's run, or the one before where the run is resumed.

        Raises UserError for what the user can mend before the training: that ends the run.
        """

    def log(self, group: str, row: Row) -> None:
        """Numbers of one step. group: "train" or "eval". row: finite numbers, and `step`."""

    def finish(self, metrics: Row, finished: bool) -> None:
        """The last call. metrics: of the final model; empty without an evaluation.

        finished: False where a signal or an error ended the run.
        """
