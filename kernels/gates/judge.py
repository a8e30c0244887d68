"""Faults of one compiled kernel: those that no kernel may have, and those that may be known.

The second kind costs time, not results; `known.py` lists where it is accepted, and why.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Optional

import triton

from fastirt.kernels.gates import texts
from fastirt.kernels.gates.known import CEILINGS, EXCEPTIONS, MARGIN

if TYPE_CHECKING:
    from fastirt.kernels.variants.jobs import Job

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory a program
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
FP32_SPILL_LIMIT = 4096  # bytes; without matrix instructions, products are computed in registers
FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.]*\.f(?:16|32|64)")
# The compiler of `known.py`'s figures; with another they are shown, but nothing depends on them.
TRITON = "3.7."


@dataclass
class Report:
    job: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    each: Optional[float] = None  # instructions for each pair, or for each element of `gather`
    found: dict[str, str] = field(default_factory=dict)  # gate to what it found
    faults: list[str] = field(default_factory=list)

    @property
    def known(self) -> list[str]:
        """Gates whose finding is an exception."""
        return [gate for gate, text in self.found.items() if text not in self.faults]


@dataclass(frozen=True)
class Texts:
    """What the compiler made of a job; `log` is what ptxas printed."""

    ttgir: str = ""
    ptx: str = ""
    sass: str = ""
    log: str = ""


def judge(job: Job, report: Report, compiled: Texts, elements: int) -> None:
    """Add to `report` what is wrong. elements: how many a program of `gather` writes."""
    _must(job, report, compiled)
    report.each = instructions_each(job, compiled.sass, elements)
    report.found = findings(job, report.each, compiled)
    if triton.__version__.startswith(TRITON):
        report.faults += [text for gate, text in report.found.items() if not excused(gate, job)]


def excused(gate: str, job: Job) -> bool:
    return tile_key(job) in EXCEPTIONS.get((gate, job.kernel, job.arch), "").split()


def _must(job: Job, report: Report, compiled: Texts) -> None:
    exact = job.tile is not None and job.precision == "fp32"
    if report.spill_bytes > (FP32_SPILL_LIMIT if exact else 0):
        report.faults.append(f"spills {report.spill_bytes} bytes")
    if report.shared_bytes > SHARED_LIMIT[job.arch]:
        report.faults.append(f"shared memory {report.shared_bytes} > {SHARED_LIMIT[job.arch]}")
    if "C7512" in compiled.log or ("wgmma" in compiled.log and "serializ" in compiled.log):
        report.faults.append("wgmma is serialised")
    if job.tile and not exact and not report.matrix:
        report.faults.append("no matrix instruction")
    elif job.tile and not exact and job.tile.bm >= 64 and INSTRUCTION[job.arch] not in report.matrix:
        report.faults.append(f"no {INSTRUCTION[job.arch]}")
    if FLOAT_ATOMIC.search(compiled.ptx):
        report.faults.append("floating-point atomic")


def findings(job: Job, each: Optional[float], compiled: Texts) -> dict[str, str]:
    """Gate to what is wrong, of the gates that may have exceptions."""
    found = {}
    waits = texts.waits_in_loops(compiled.ttgir)
    if job.tile and job.tile.stages > 1 and not job.waits_for_labels and 0 in waits:
        found["wait"] = f"{waits.count(0)} of {len(waits)} async_wait in loops wait for every copy"
    repeats = max((dot.repeats for dot in texts.dots(compiled.ttgir)), default=1)
    if repeats > 1:
        found["warps"] = f"the warps compute each result of a product {repeats} times"
    if _is_gather(job) and (count := texts.byte_loads(compiled.ptx)):
        found["bytes"] = f"{count} loads of one byte"
    if each is None and job.tile:
        found["instructions"] = "no loop with products"
    elif each is not None:
        ceiling = CEILINGS.get(ceiling_key(job))  # none for most of `--all`
        if ceiling is not None and each > ceiling * MARGIN:
            found["instructions"] = f"{each:.1f} instructions each, {ceiling:.1f} before"
    return found


def _is_gather(job: Job) -> bool:
    return job.kernel.split()[0] == "gather"


def ceiling_key(job: Job) -> str:
    head = f"{job.kernel} sm_{job.arch} {job.precision} D={job.dim}"
    if job.tile is None:
        return head
    if not job.is_objective:
        return f"{head} {tile_key(job)}"
    uses = [
        job.columns,
        "mean" if job.nonzero else "sum",
        job.use.name,
        *(["any slots"] if job.waits_for_labels else []),
    ]
    return f"{head} {tile_key(job)} {' '.join(uses)}"


def tile_key(job: Job) -> str:
    t = job.tile
    return f"{t.bm}x{t.bn}x{t.bd}w{t.warps}s{t.stages}" if t else "-"


def instructions_each(job: Job, sass: str, elements: int) -> Optional[float]:
    """Instructions of all threads in a turn of the main loop, for each pair of the tile.

    Of `gather`, which has no loop: in the whole program, for each element. None for other kernels.
    """
    if _is_gather(job):
        return texts.instructions(sass) * job.threads / elements
    if job.tile is None:
        return None
    length = texts.main_loop(sass)
    return None if length is None else length * job.threads / (job.tile.bm * job.tile.bn)


def stale(jobs: list[Job], reports: list[Report], whole: bool) -> list[str]:
    """Exceptions and ceilings that no kernel needs; whole: whether `jobs` are all there are."""
    if not triton.__version__.startswith(TRITON):
        return []
    seen = {(job.kernel, job.arch, tile_key(job)) for job in jobs}
    needed = {(gate, job.kernel, job.arch, tile_key(job)) for job, r in zip(jobs, reports) for gate in r.found}
    entries = [(*key, tile) for key, tiles in EXCEPTIONS.items() for tile in tiles.split()]
    left = [" ".join(map(str, e)) for e in entries if e not in needed and (whole or e[1:] in seen)]
    if whole:
        left += sorted(CEILINGS.keys() - {ceiling_key(job) for job in jobs})
    return [f"known.py: nothing needs {entry!r}" for entry in left]


def tables(jobs: list[Job], reports: list[Report]) -> str:
    """`EXCEPTIONS` and `CEILINGS` as these kernels would have them."""
    exceptions: dict[tuple[str, str, int], list[str]] = {}
    ceilings: dict[str, float] = {}
    for job, report in zip(jobs, reports):
        for gate in report.found.keys() - {"instructions"}:
            exceptions.setdefault((gate, job.kernel, job.arch), []).append(tile_key(job))
        if report.each is not None:
            ceilings[ceiling_key(job)] = max(round(report.each, 1), ceilings.get(ceiling_key(job), 0.0))
    lines = []
    for (gate, kernel, arch), tiles in sorted(exceptions.items()):
        wrapped = textwrap.wrap(" ".join(dict.fromkeys(tiles)), 90)
        key = f'    ("{gate}", "{kernel}", {arch})'
        one_line = [f'{key}: "{wrapped[0]}",']
        lines += one_line if len(wrapped) == 1 else [f'{key}: """', *(f"        {w}" for w in wrapped), '    """,']
    return "\n".join([*lines, "", *(f'    "{key}": {each},' for key, each in ceilings.items())])
