"""Logs of a run: a progress bar, one JSON line per log step, TensorBoard."""

from __future__ import annotations

import errno
import json
import logging
import math
import sys
import threading
from pathlib import Path
from typing import Any, Optional, TypeVar

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastirt.atomic import atomic_write
from fastirt.errors import UserError

log = logging.getLogger("fastirt")
T = TypeVar("T")


class RunLog:
    """Writes JSON lines to `path` and TensorBoard events; rows past `step` (of a run that was
    killed) are cut off.
    """

    def __init__(self, path: Path, tensorboard: Path, step: int, total: int, redo: bool) -> None:
        """redo: the evaluation of `step` itself will be done again, so its row goes too.

        Raises UserError for a log that cannot be written.
        """
        self.path = path
        try:
            truncate_log(self.path, step, redo)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}): choose another --output-dir"
            ) from error
        self._board = TensorBoardLog(tensorboard, step)
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self.bar = tqdm(
            initial=step, total=total, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty(), desc="train"
        )

    def row(self, row: dict[str, Any]) -> None:
        """One log step or evaluation: `row` holds `step` and numbers."""
        row = {name: value for name, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._board.add("train" if "loss" in row else "eval", row)

    def losses(self, row: dict[str, Any], lambda_reg: float) -> None:
        """The row of a log step, and a line of it for the console."""
        self.row(row)
        text = (
            f"loss {row['loss']:.4f} = batch {row['contrastive_batch']:.4f} + memory {row['contrastive_memory']:.4f} "
            f"+ {lambda_reg:g} x koleo {row['koleo']:.4f}"
        )
        mfu = f"MFU {100 * row['mfu']:.1f} %, " if "mfu" in row else ""
        speed = f"{row['imgs_per_s']:.0f} imgs/s, {mfu}input wait {100 * row['input_wait']:.1f} %"
        self.bar.set_postfix_str(f"{text}, {speed}")
        left = f"{int(row['seconds_left']) // 60}:{int(row['seconds_left']) % 60:02d}"
        log.info("step %d/%d  %s  %s  %s left", row["step"], self.bar.total, text, speed, left)

    def close(self) -> None:
        self.bar.close()
        self._redirect.__exit__(None, None, None)
        self._board.close()
        self._file.close()


class NoLog:
    """The log of ranks other than rank 0: nothing is written."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def row(self, row: dict[str, Any]) -> None: ...

    def losses(self, row: dict[str, Any], lambda_reg: float) -> None: ...

    def close(self) -> None: ...


def truncate_log(path: Path, step: int, redo: bool = False) -> None:
    """Drop half-written rows and rows past `step`; with `redo` also the evaluation of `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if (
            isinstance(row, dict)
            and "step" in row
            and (row["step"] < step or (row["step"] == step and ("loss" in row or not redo)))
        ):
            kept.append(line + "\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


class TensorBoardLog:
    """Scalars for TensorBoard.

    A folder that fails (full, gone, not writable) is logged once and never ends a run.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """step: of the run; TensorBoard hides events past it, which a killed run left.

        Raises UserError at step 0 for a folder that cannot be made.
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
        except Exception as error:  # file systems and their libraries raise many kinds
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
        """The writer's thread would print a traceback; the next `add` or `close` reports it."""
        if not isinstance(args.exc_value, OSError) or type(args.thread).__name__ != "_AsyncWriterThread":
            self._print_exception(args)
