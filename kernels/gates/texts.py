"""Reads the compiler's texts: TTGIR (Triton's layouts and pipeline), PTX and SASS (instructions).

Pure functions of a text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Iterator, Optional

LOOP = re.compile(r"\bscf\.(?:for|while)\b")
ASYNC_WAIT = re.compile(r"\bttg\.async_wait\b.*\{num = (\d+)")
DOT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, #(\w+)>")
LAYOUT = re.compile(r"^#(\w+) = #ttg\.(nvidia_mma|blocked)<\{(.*)\}>", re.MULTILINE)
BYTE_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*\.[bsu]8\b")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
LABEL = re.compile(r"^(\.L_\w+):")
# Instructions of products: of matrices on tensor cores, else fused multiply and add.
MATRIX = re.compile(r"^(?:[HIDUQ]+G?MMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Dot:
    """A product of a tile (rows, columns), and what one instruction of all warps covers of it."""

    rows: int
    columns: int
    covered_rows: int
    covered_columns: int

    @property
    def repeats(self) -> int:
        """How often the warps compute each result: 1 unless they cover more than the tile."""
        return max(1, self.covered_rows // self.rows) * max(1, self.covered_columns // self.columns)


def waits_in_loops(ttgir: str) -> list[int]:
    """The number of copies that may still be under way after each `async_wait` inside a loop."""
    found = []
    loops: list[int] = []  # indentation of each loop around the line
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loops and indent == loops[-1] and line.lstrip().startswith("}"):
            loops.pop()
        elif LOOP.search(line) and line.split(" loc(")[0].rstrip().endswith("{"):
            loops.append(indent)
        elif loops and (wait := ASYNC_WAIT.search(line)):
            found.append(int(wait.group(1)))
    return found


def dots(ttgir: str) -> list[Dot]:
    """Each product whose result lies in registers; tcgen05's lie in tensor memory."""
    layouts = {name: _covered(kind, text) for name, kind, text in LAYOUT.findall(ttgir)}
    return [
        Dot(int(rows), int(columns), *layouts[layout])
        for rows, columns, layout in DOT.findall(ttgir)
        if layout in layouts
    ]


def _covered(kind: str, text: str) -> tuple[int, int]:
    def numbers(name: str) -> list[int]:
        found = re.search(rf"{name} = \[([\d, ]+)\]", text)
        return [int(n) for n in found.group(1).split(",")] if found else [1, 1]

    warps = numbers("warpsPerCTA")
    if kind == "blocked":
        one = [math.prod(pair) for pair in zip(numbers("sizePerThread"), numbers("threadsPerWarp"))]
    else:  # version 2 has [m, n], version 3 [m, n, k]
        one = numbers("instrShape")
    if len(warps) != 2:  # of other tensors than tiles
        return 1, 1
    return warps[0] * one[0], warps[1] * one[1]


def byte_loads(ptx: str) -> int:
    """Number of loads of one byte from global memory; b8 of a vector such as v4.b8 counts too."""
    return len(BYTE_LOAD.findall(ptx))


def instructions(sass: str) -> int:
    """Number of instructions, without what fills the last cache line behind the kernel's end."""
    return sum(name != "NOP" for name in _names(sass.splitlines())) - len(_endless(sass))


def main_loop(sass: str) -> Optional[int]:
    """Number of instructions of the shortest outermost loop that multiplies, or None without one.

    A kernel with a loop over the batch and one over the memory takes the nearest column in the
    first, so that the shorter one is the memory's.
    """
    lines = sass.splitlines()
    labels = {match.group(1): number for number, line in enumerate(lines) if (match := LABEL.match(line))}
    spans = []
    for number, line in enumerate(lines):
        branch = BRANCH.search(line)
        if branch and labels.get(branch.group(1), number) < number:
            spans.append((labels[branch.group(1)], number))
    outermost = [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]
    lengths = []
    for start, end in outermost:
        names = [name for name in _names(lines[start : end + 1]) if name != "NOP"]
        if any(MATRIX.match(name) or name.split(".")[0] in ("FFMA", "FFMA2") for name in names):
            lengths.append(len(names))
    return min(lengths, default=None)


def _names(lines: list[str]) -> Iterator[str]:
    return (match.group(1) for line in lines if (match := INSTRUCTION.match(line)))


def _endless(sass: str) -> list[str]:
    """Branches to themselves, which ptxas puts behind the last EXIT."""
    return re.findall(r"^(\.L_\w+):\n\s*/\*\w+\*/\s+BRA `\(\1\)", sass, re.MULTILINE)
