"""TensorBoard: event files in the run's folder, or below --log-dir."""

from __future__ import annotations

import errno
import logging
import threading
from typing import Any, Optional

from torch.utils.tensorboard import SummaryWriter

from fastirt.errors import UserError
from fastirt.training.trackers.interface import Row, TrackedRun

log = logging.getLogger("fastirt")


class TensorBoard:
    """Scalars, named `group/name`.

    A folder that fails (full, gone, not writable) is logged once.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.folder, self.step = run.tensorboard, run.step
        self._writer: Optional[SummaryWriter] = None
        self._print_exception = threading.excepthook

    def start(self) -> None:
        """Raises UserError at step 0 for a folder that cannot be made.

        TensorBoard hides events past the step, which a killed run left.
        """
        threading.excepthook = self._on_thread_error
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        except OSError as error:
            if self.step == 0 and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                threading.excepthook = self._print_exception
                raise UserError(
                    f"--log-dir {self.folder}: cannot be written ({error.strerror or error}): choose another folder"
                ) from error
            self._stop(error)
        except Exception as error:  # file systems and their libraries raise many kinds
            self._stop(error)

    def log(self, group: str, row: Row) -> None:
        try:
            for name, value in row.items():
                if self._writer is not None and name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])
        except Exception as error:
            self._stop(error)

    def finish(self, metrics: Row, finished: bool) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:
            self._stop(error)
        finally:
            threading.excepthook = self._print_exception

    def _stop(self, error: BaseException) -> None:
        self._writer = None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        log.warning(
            "%s: TensorBoard logs cannot be written there (%s): they stop here, log.jsonl goes on", self.folder, reason
        )

    def _on_thread_error(self, args: Any) -> None:
        """The writer's thread would print a traceback; the next `log` or `finish` reports it."""
        if not isinstance(args.exc_value, OSError) or type(args.thread).__name__ != "_AsyncWriterThread":
            self._print_exception(args)
