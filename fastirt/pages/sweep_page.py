"""The page of `fastirt sweep`: settings by their metric, as a table and as dots on one scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

from fastirt.pages.render import write_page


class PageRow(NamedTuple):
    """One setting."""

    place: int
    values: Sequence[str]  # of the options
    metrics: Sequence[str]
    measured: Sequence[float]  # the chosen metric of each finished run
    runs: Sequence[tuple[int, str, str]]  # (seed, status, folder below the page)
    status: str  # "finished", "waiting" or "failed"
    error: str
    seconds: float


class SweepPage(NamedTuple):
    """A sweep; rows are sorted, the best first."""

    title: str
    metric: str
    in_percent: bool
    options: Sequence[str]
    metrics: Sequence[str]  # column names
    rows: Sequence[PageRow]
    seeds: Sequence[int]
    facts: dict[str, Any]  # classes and images by split
    command: Optional[str]  # that trains the best setting; None while there is none


class Dot(NamedTuple):
    """Places on the scale, in percent of its width."""

    runs: Sequence[float]
    mean: Optional[float]


def write_sweep_page(path: Path, page: SweepPage) -> int:
    """Write the page; returns its size in bytes. Raises UserError where it cannot be written."""
    every = [value for row in page.rows for value in row.measured]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    room = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-3)
    low, high = low - room, high + room

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    dots = [
        Dot([place(v) for v in row.measured], place(sum(row.measured) / len(row.measured)) if row.measured else None)
        for row in page.rows
    ]
    scale = 100 if page.in_percent else 1
    ends = [f"{scale * low:.2f}", f"{scale * high:.2f}"] if every else []
    counts = {name: sum(row.status == name for row in page.rows) for name in ("finished", "waiting", "failed")}
    return write_page(path, "sweep.html", title=page.title, page=page, dots=dots, ends=ends, counts=counts)
