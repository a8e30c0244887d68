"""The file of a step's kernels: written by `record.py`, read by `model.py`. Standard library only.

A kernel has: phase ("forward 0", "eager", "own", ...), category, name, launches, bytes read and
written, flops, and count: how many times the step has it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "kernels"
KEYS = ("phase", "category", "name", "launches", "bytes", "flops")


def read(path: Path) -> dict[str, Any]:
    """{"row", "sizes", "command", "torch", "kernels"}. Raises ValueError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        absent = {"row", "sizes", "command", "kernels"} - set(content)
        absent |= {key for kernel in content.get("kernels", []) for key in {*KEYS, "count"} - set(kernel)}
        if absent:
            raise ValueError(f"lacks {', '.join(sorted(absent))}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of kernels ({error})") from None
    return content


def read_all(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every list of a folder. Raises ValueError if there is none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: no lists of kernels: make one with python -m benchmarks.predict.record")
    return [read(path) for path in paths]


def find(row: str, sizes: dict[str, Any], folder: Path = FOLDER) -> dict[str, Any] | None:
    """The list of one row of `benchmarks step` at these sizes; None without one."""
    path = folder / f"{file_name(row, sizes)}.json"
    content = read(path) if path.is_file() else None
    return content if content and content["sizes"] == sizes else None


def write(folder: Path, row: str, sizes: dict[str, Any], kernels: list[dict[str, Any]], torch: str) -> Path:
    """Write one list, equal kernels as one with their count, a kernel a line; returns its path."""
    counts: dict[tuple, int] = {}
    for kernel in kernels:
        key = tuple(kernel[name] for name in KEYS[:4]) + (round(kernel["bytes"]), round(kernel["flops"]))
        counts[key] = counts.get(key, 0) + 1
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    head = {
        "row": row,
        "sizes": sizes,
        "command": f'python -m benchmarks.predict.record "{row}" {flags}',
        "torch": torch,
    }
    lines = [json.dumps({**dict(zip(KEYS, key)), "count": count}) for key, count in counts.items()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "kernels": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(row, sizes)}.json"
    path.write_text(text, encoding="utf-8")
    return path


def file_name(row: str, sizes: dict[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{row} batch {sizes['batch_size']} {sizes['model']}".lower()).strip("-")
