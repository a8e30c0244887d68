"""Compiles every kernel as the command line can launch it, without a GPU, and reports on it.

python -m fastirt.kernels.aot [--arch 80 90 100] [--kernel NAME] [--all]    exit code 1: a fault
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.variants.jobs import ARCHS, Job, jobs, source

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory a program
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
FP32_SPILL_LIMIT = 4096  # bytes; without matrix instructions, products are computed in registers
FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.]*\.f(?:16|32|64)")


@dataclass
class Report:
    job: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def compile_job(job: Job) -> Report:
    """Compile one job and read registers, spills, shared memory and instructions.

    A compiler error is a fault in the report.
    """
    report = Report(job.name)
    kernel, types, constants, options = source(job)
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else types(name) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    try:
        ast = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(ast, target=GPUTarget("cuda", job.arch, 32), options=options)
    except Exception as error:  # the report is about whatever the compiler raises
        report.faults.append(f"does not compile: {' '.join(str(error).split())[:200]}")
        return report
    ptx = compiled.asm["ptx"]
    report.shared_bytes = compiled.metadata.shared
    report.matrix = {name: ptx.count(name) for name in INSTRUCTION.values() if name in ptx}
    log = _assemble(ptx, job.arch)
    report.registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    report.spill_bytes = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    _judge(job, report, ptx, log)
    return report


def _judge(job: Job, report: Report, ptx: str, log: str) -> None:
    exact = job.tile is not None and job.precision == "fp32"
    if report.spill_bytes > (FP32_SPILL_LIMIT if exact else 0):
        report.faults.append(f"spills {report.spill_bytes} bytes")
    if report.shared_bytes > SHARED_LIMIT[job.arch]:
        report.faults.append(f"shared memory {report.shared_bytes} > {SHARED_LIMIT[job.arch]}")
    if "C7512" in log or ("wgmma" in log and "serializ" in log):
        report.faults.append("wgmma is serialised")
    if job.tile and not exact and not report.matrix:
        report.faults.append("no matrix instruction")
    elif job.tile and not exact and job.tile.bm >= 64 and INSTRUCTION[job.arch] not in report.matrix:
        report.faults.append(f"no {INSTRUCTION[job.arch]}")
    if FLOAT_ATOMIC.search(ptx):
        report.faults.append("floating-point atomic")


def _assemble(ptx: str, arch: int) -> str:
    """What ptxas prints about a kernel."""
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = nvidia / ("ptxas-blackwell" if arch >= 100 and (nvidia / "ptxas-blackwell").exists() else "ptxas")
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run(
            [str(ptxas), "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))],
            capture_output=True, text=True,
        )  # fmt: skip
    return done.stdout + done.stderr


def reports(
    archs: tuple[int, ...] = ARCHS, only: Optional[str] = None, workers: Optional[int] = None, every: bool = False
) -> list[Report]:
    """All reports of `jobs`; those of unchanged sources come from Triton's cache folder."""
    todo = [job for job in jobs(archs, every) if only is None or job.kernel.split()[0] == only]
    folder = Path(__file__).parent
    text = "".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    digest = hashlib.sha256((text + triton.__version__).encode()).hexdigest()[:16]
    path = Path(triton.knobs.cache.dir) / f"fastirt-aot-{digest}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [job for job in todo if job.name not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for done, (job, report) in enumerate(zip(missing, pool.map(compile_job, missing)), start=1):
            known[job.name] = asdict(report)
            if done % 20 == 0 or done == len(missing):  # a sweep that is ended goes on from here
                temporary = path.with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps(known))
                temporary.replace(path)
    return [Report(**known[job.name]) for job in todo]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="compute capabilities (default: all)"
    )
    parser.add_argument(
        "--kernel", choices=("stats", "grad", "rows", "totals", "combine", "gather"), help="only this one"
    )
    parser.add_argument("--all", action="store_true", help="all combinations: an hour on two cores")
    args = parser.parse_args()
    if INTERPRETED:  # at import the kernels were made for the interpreter: restart without it
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "fastirt.kernels.aot", *sys.argv[1:]], environment)
    rows = reports(tuple(args.arch), args.kernel, every=args.all)
    width = max(len(report.job) for report in rows)
    print(f"{'kernel':{width}}  registers  spill B  shared KiB  matrix instructions")
    for r in rows:
        matrix = ", ".join(f"{name} x{count}" for name, count in r.matrix.items()) or "-"
        fault = f"   FAULT: {'; '.join(r.faults)}" if r.faults else ""
        print(f"{r.job:{width}}  {r.registers:9}  {r.spill_bytes:7}  {r.shared_bytes / 1024:10.1f}  {matrix}{fault}")
    bad = sum(bool(report.faults) for report in rows)
    print(f"{len(rows)} kernels, {bad} at fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
