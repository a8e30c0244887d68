"""Report of unusable images: each file once; too many stop the run."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import Iterable

from fastirt.distributed.host_channel import HostChannel
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError
from fastirt.images.source import ImageSource

COLUMNS = ("path", "reason", "step")


class BadImages:
    """Reports each bad file once: a warning, and a row path, reason, step of `bad_pictures.csv`.

    Rows already in the file count and are not repeated, so resumed runs and all loaders of a run
    share one list.

    Args:
        csv_path: the file, or None for none.
        max_bad: `add` raises UserError once more than this many distinct files are bad.
        logs: False on ranks other than the main one, which count but neither log nor write.
    """

    def __init__(self, csv_path: Path | str | None, max_bad: int, logs: bool = True) -> None:
        self.csv_path, self.max_bad, self.logs = None if csv_path is None else Path(csv_path), max_bad, logs
        self._paths = {row[0] for row in read_rows(self.csv_path)} if self.csv_path else set()

    def add(self, path: str, reason: str, step: int) -> None:
        """Report a file unless it was reported before. Raises UserError above `max_bad` files."""
        if path not in self._paths:
            self._paths.add(path)
            if self.logs:
                logging.getLogger("fastirt").warning("bad image: %s: %s", path, reason)
                self._write(path, reason, step)
        if len(self._paths) > self.max_bad:
            hint = f"see {self.csv_path}; " if self.csv_path else ""
            raise UserError(
                f"more than {self.max_bad} unreadable images; last: {path}: {reason}; "
                f"{hint}raise --max-bad or repair the files"
            )

    def _write(self, path: str, reason: str, step: int) -> None:
        if self.csv_path is None:
            return
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        old = self.csv_path.read_bytes() if self.csv_path.exists() else b""
        if old and not old.endswith(b"\n"):  # end the partial row of a killed process
            text.write("\n")
        writer = csv.writer(text, lineterminator="\n")
        if not old:
            writer.writerow(COLUMNS)
        writer.writerow((path, " ".join(reason.split()), step))
        with open(self.csv_path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text.getvalue())


def read_rows(csv_path: Path) -> list[list[str]]:
    """Complete rows of a `bad_pictures.csv` without its header; none if there is no file."""
    if not csv_path.exists():
        return []
    with open(csv_path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    return [row for row in rows if len(row) == len(COLUMNS) and tuple(row) != COLUMNS]


class BadRows:
    """Rows of a split known to be unreadable, the same on all ranks after each `sync`.

    `rows` is a frozenset that `add` and `sync` replace and never change: other threads read it.
    """

    def __init__(
        self,
        source: ImageSource,
        csv_path: Path | None,
        max_bad: int,
        known: Iterable[int] = (),
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        """known: bad rows of a checkpoint; they are not reported again."""
        self.source, self.ranks = source, ranks
        self.rows = frozenset(int(row) for row in known)
        self._images = BadImages(csv_path, max_bad, ranks.is_main)
        self._new: list[tuple[int, str, int]] = []  # (row, reason, step) since the last `sync`

    def add(self, row: int, reason: str, step: int) -> None:
        """Mark a row bad and report it (distributed: at the next `sync`).

        Raises UserError for more than `max_bad` distinct files.
        """
        self.rows |= {row}
        self._new.append((row, reason, step))
        if not self.ranks.is_distributed:
            self._images.add(self.source.path(row), reason, step)

    def sync(self, channel: HostChannel) -> set[int]:
        """The rows that any rank found bad since the last call. A collective call.

        channel: `ranks.loader_host` for training batches, else `ranks.host`.
        Raises UserError for more than `max_bad` distinct files.
        """
        found, self._new = self._new, []
        new: dict[int, tuple[str, int]] = {}
        for part in channel.gather_json(found):
            for row, reason, step in part:
                new.setdefault(row, (reason, step))
        self.rows |= new.keys()
        if self.ranks.is_distributed:
            for row, (reason, step) in new.items():
                self._images.add(self.source.path(row), reason, step)
        return set(new)
