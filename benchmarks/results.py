"""Figures: measured values beside the machine's limit, with device, versions and commit; one JSON
line each, written as soon as it is measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterable, Sequence

import torch

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "timm", "torchvision", "nvidia-dali-cuda130", "faiss-gpu", "faiss-cpu", "numpy", "apex")


@dataclass(frozen=True)
class Figure:
    """One contender's result: p20, p50, p80 over the repeats, in `unit`.

    params: the sizes. `compare` matches figures by them, so their keys stay as in committed files.
    better: "higher" or "lower". limit: the most that this machine could do, in `unit`, by
    `limit_name`. extra: further values, which `report` may show and `compare` ignores.
    """

    part: str
    name: str
    unit: str
    p20: float
    p50: float
    p80: float
    params: dict[str, Any]
    better: str = "higher"
    limit: float | None = None
    limit_name: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1

    @property
    def share_of_limit(self) -> float | None:
        """Measured over possible: 1 is the limit."""
        if not self.limit or not self.p50:
            return None
        return self.p50 / self.limit if self.better == "higher" else self.limit / self.p50


def figure_of(values: Sequence[float], **rest: Any) -> Figure:
    """A Figure of the repeats' values; `rest` are its other fields."""
    steps = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return Figure(p20=steps[0], p50=statistics.median(values), p80=steps[3], repeats=len(values), **rest)


class Results:
    """Prints figures and appends them to a file of JSON lines.

    path: None only prints. limits: the machine's, by name, as `ceilings` measures them.
    """

    def __init__(self, path: Path | None, device: torch.device, limits: dict[str, float]) -> None:
        self.path, self.device, self.limits = path, device, limits
        self.figures: list[Figure] = []
        self.environment = environment(device)

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        print(line(figure), flush=True)
        self._append({**asdict(figure), "share_of_limit": figure.share_of_limit})

    def not_run(self, part: str, name: str, why: str) -> None:
        """Report a contender that was not run, and the reason. It has no figure."""
        print(f"{part:10} {name:26} not run: {why}", flush=True)
        self._append({"part": part, "name": name, "not_run": why})

    def _append(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, **self.environment, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def line(figure: Figure) -> str:
    """What `Results.add` prints."""
    sizes = " ".join(f"{name}={value}" for name, value in figure.params.items())
    text = f"{figure.part:10} {figure.name:26} {figure.p50:11.4g} {figure.unit} ({figure.p20:.4g}-{figure.p80:.4g})"
    if figure.share_of_limit is not None:
        text += f"  {100 * figure.share_of_limit:5.1f} % of {figure.limit:.4g} ({figure.limit_name})"
    shown = {name: value for name, value in figure.extra.items() if value is not None and not isinstance(value, dict)}
    more = "  ".join(f"{name} {_short(value)}" for name, value in shown.items())
    return f"{text}  {more}  [{sizes}]"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of results files; a truncated last line is left out.

    Raises ValueError that names file and line for any other damage.
    """
    rows = []
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
        for number, text in enumerate(lines, 1):
            try:
                row = json.loads(text)
                if "not_run" not in row:
                    absent = {"part", "name", "unit", "p20", "p50", "p80", "params", "device"} - set(row)
                    if absent:
                        raise ValueError(f"lacks {', '.join(sorted(absent))}")
            except (ValueError, TypeError) as error:
                if number == len(lines) and not text.endswith("\n"):
                    continue
                raise ValueError(f"{path}, line {number}: not a result ({error})") from None
            rows.append(row)
    return rows


def key(row: dict[str, Any]) -> str:
    """Two figures with the same key can be compared."""
    return json.dumps([row["part"], row["name"], row["unit"], row["params"], row["device"]], sort_keys=True)


def default_path(name: str) -> Path:
    """name: of the device, or of what is no measurement."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return FOLDER / f"{datetime.date.today().isoformat()}-{slug}.jsonl"


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU, N threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@lru_cache
def environment(device: torch.device) -> dict[str, Any]:
    """What a result needs to be checked: device, driver, commit, versions, command."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # names its CUDA version too, e.g. +cu130
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device.type == "cuda" else ""
    )
    return {
        "device": device_name(device),
        "driver": driver.splitlines()[0] if driver else None,
        "commit": _output("git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty") or "unknown",
        "versions": versions,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _output(*command: str) -> str:
    """What a command prints; empty if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
