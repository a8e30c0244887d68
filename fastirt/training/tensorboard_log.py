"""Scalars for TensorBoard, whose failure never ends a run."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any, Optional

from torch.utils.tensorboard import SummaryWriter

from fastirt.errors import UserError

log = logging.getLogger("fastirt")


class TensorBoardLog:
    """Writes scalars until the folder fails (full, gone, not writable); that is logged once, and nothing is written then."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: of the run; TensorBoard hides earlier events past it, those of a run that was killed. Raises UserError where
        a run that only begins is given a folder that cannot be made.
        """
        self.folder = folder
        self._writer: Optional[SummaryWriter] = None
        self._print_exception = threading.excepthook
        threading.excepthook = self._on_thread_error
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            if step == 0 and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"--log-dir {folder}: cannot be written ({error.strerror or error}): choose another folder"
                ) from error
            self._stop(error)
        except Exception as error:  # whatever the file system and its libraries raise
            self._stop(error)

    def add(self, group: str, row: dict[str, Any]) -> None:
        """The numbers of `row`, named `group/name`, at its `step`."""
        try:
            for name, value in row.items():
                if self._writer is not None and name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])
        except Exception as error:
            self._stop(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:
            self._stop(error)
        threading.excepthook = self._print_exception

    def _stop(self, error: BaseException) -> None:
        self._writer = None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        log.warning(
            "%s: TensorBoard logs cannot be written there (%s): they stop here, log.jsonl goes on", self.folder, reason
        )

    def _on_thread_error(self, args: Any) -> None:
        """The writer's own thread prints a traceback where a write fails; the next `add` or `close` reports it instead."""
        if not isinstance(args.exc_value, OSError) or type(args.thread).__name__ != "_AsyncWriterThread":
            self._print_exception(args)
