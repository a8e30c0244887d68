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
from dataclasses import asdict
from pathlib import Path
from typing import Optional

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastirt.kernels import gather
from fastirt.kernels.gates.judge import INSTRUCTION, Report, Texts, judge, stale, tables
from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.variants.jobs import ARCHS, Job, jobs, source


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
    log, sass = _assemble(ptx, job.arch)
    report.registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    report.spill_bytes = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    judge(job, report, Texts(compiled.asm["ttgir"], ptx, sass, log), gather.GROUPS * gather.PIXELS * 3)
    return report


def _assemble(ptx: str, arch: int) -> tuple[str, str]:
    """What ptxas prints about a kernel, and its instructions (SASS)."""
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = nvidia / ("ptxas-blackwell" if arch >= 100 and (nvidia / "ptxas-blackwell").exists() else "ptxas")
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        binary = path.with_suffix(".cubin")
        commands = ([ptxas, "-v", f"--gpu-name={target}", path, "-o", binary], [nvidia / "nvdisasm", "-c", binary])
        done = [subprocess.run(list(map(str, command)), capture_output=True, text=True) for command in commands]
    return done[0].stdout + done[0].stderr, done[1].stdout


def reports(todo: list[Job], workers: Optional[int] = None) -> list[Report]:
    """Their reports; those of unchanged sources come from Triton's cache folder."""
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
        "--kernel", choices=("stats", "grad", "rows", "totals", "combine", "gather", "count"), help="only this one"
    )
    parser.add_argument("--all", action="store_true", help="all combinations: an hour on two cores")
    parser.add_argument("--tables", action="store_true", help="print the tables of gates/known.py instead")
    args = parser.parse_args()
    if INTERPRETED:  # at import the kernels were made for the interpreter: restart without it
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "fastirt.kernels.aot", *sys.argv[1:]], environment)
    todo = [job for job in jobs(tuple(args.arch), args.all) if args.kernel in (None, job.kernel.split()[0])]
    rows = reports(todo)
    if args.tables:
        print(tables(todo, rows))
        broken = [f"{r.job}: {fault}" for r in rows for fault in r.faults if fault not in r.found.values()]
        print("".join(f"{line}\n" for line in broken), end="", file=sys.stderr)
        return 1 if broken else 0
    width = max(len(report.job) for report in rows)
    print(f"{'kernel':{width}}  registers  spill B  shared KiB  instructions each  matrix instructions")
    for r in rows:
        matrix = ", ".join(f"{name} x{count}" for name, count in r.matrix.items()) or "-"
        each = "-" if r.each is None else f"{r.each:.1f}"
        known = f"   known: {', '.join(r.known)}" if r.known else ""
        fault = f"   FAULT: {'; '.join(r.faults)}" if r.faults else ""
        kib = r.shared_bytes / 1024
        print(f"{r.job:{width}}  {r.registers:9}  {r.spill_bytes:7}  {kib:10.1f}  {each:>17}  {matrix}{known}{fault}")
    left = stale(todo, rows, whole=len(todo) == len(jobs()))
    print("".join(f"{entry}\n" for entry in left), end="")
    bad = sum(bool(report.faults) for report in rows) + len(left)
    print(f"{len(rows)} kernels, {bad} at fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
