"""Compiles every kernel in every default configuration without a GPU and reports on the results.

python -m fastirt.kernels.aot [--arch 80 90 100] [--kernel NAME]    exit code 1 if a row has a fault
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastirt.kernels import gather
from fastirt.kernels.gates.judge import INSTRUCTION, Report, Texts, judge, stale, tables
from fastirt.kernels.passes import backward, forward, losses
from fastirt.kernels.passes.tiles import INTERPRETED
from fastirt.kernels.plan import LOADS_AHEAD, cdiv, chunk
from fastirt.kernels.tile_table import TABLE, Tile, lookup

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Job:
    """One kernel with one set of constants for one target."""

    kernel: str
    arch: int
    precision: str
    dim: int
    tile: Optional[Tile] = None
    nonzero: bool = True
    finite_slots: bool = True

    @property
    def name(self) -> str:
        t = self.tile
        tile = (
            f" {t.bm}x{t.bn}x{t.bd} warps={t.warps} stages={t.stages} out={t.grad_chunks} skip={int(t.skip_inactive)}"
            if t
            else ""
        )
        reduction = "nonzero_mean" if self.nonzero else "anchor_sum"
        slots = " any slots" if self.waits_for_labels else ""
        return f"{self.kernel} sm_{self.arch} {self.precision} D={self.dim}{tile} {reduction}{slots}"

    @property
    def waits_for_labels(self) -> bool:
        """Whether labels decide what to load, although training's kernel does not wait for them."""
        return not self.finite_slots and self.arch in LOADS_AHEAD

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * (self.tile.warps if self.tile else gather.WARPS if "gather" in self.kernel else 4)


def jobs(archs: tuple[int, ...] = ARCHS) -> list[Job]:
    """Every row of the table at its largest D, and the kernels without a tile.

    bf16 rows for D = 1024 also at 768, the D of ViT-B.
    """
    todo = []
    for arch in archs:
        for row in TABLE:
            if arch in row.arch:
                dims = {row.dim, 768} if row.dim == 1024 and row.precision == "bf16" else {row.dim}
                for dim in sorted(dims):
                    if lookup(row.kind, arch, row.precision, dim, row.rows) == row.tile:
                        todo.append(Job(row.kind, arch, row.precision, dim, row.tile, finite_slots=arch in LOADS_AHEAD))
                        if todo[-1].finite_slots and dim == 384 and row.precision in ("bf16", "tf32"):
                            todo.append(Job(row.kind, arch, row.precision, dim, row.tile, finite_slots=False))
        todo += [Job(name, arch, "fp32", 384) for name in ("rows", "totals", "combine", "combine few")]
        todo += [Job(name, arch, "bf16", 224) for name in ("gather", "gather edges")]
    return list(dict.fromkeys(todo))


def compile_job(job: Job) -> Report:
    """Compile one job and read registers, spills, shared memory and instructions.

    A compiler error is a fault in the report.
    """
    report = Report(job.name)
    kernel, types, constants, options = _source(job)
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else types(name) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    try:
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
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


def _source(job: Job):
    """(kernel, type of an argument by name, constants, options)."""
    tile = job.tile
    has = {"HAS_BATCH": True, "HAS_MEMORY": True}
    if job.kernel in ("stats", "grad"):
        bd = chunk(tile, job.dim)
        constants = dict(
            D=job.dim, BM=tile.bm, BN=tile.bn, BD=bd, CHUNKS=cdiv(job.dim, bd), NONZERO=job.nonzero,
            HAS_SELF_INDEX=True, PRECISION="bf16" if job.precision == "mixed" else job.precision,
            FINITE_SLOTS=job.finite_slots, **has,
        )  # fmt: skip
        if job.kernel == "stats":
            constants["PAIRS"] = True
        else:
            slices = cdiv(constants["CHUNKS"], tile.grad_chunks)
            constants.update(GRAD_CHUNKS=cdiv(constants["CHUNKS"], slices), SKIP_INACTIVE=tile.skip_inactive)
        kernel = forward.stats_kernel if job.kernel == "stats" else backward.grad_kernel
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
    elif job.kernel == "rows":
        kernel, options = losses.rows_kernel, {}
        constants = dict(D=job.dim, BD=128, BR=8, BS=32, PAIRS=True, **has)
    elif job.kernel == "totals":
        kernel, options = losses.totals_kernel, {}
        constants = dict(NONZERO=True, BT=256, **has)
    elif job.kernel in ("gather", "gather edges"):
        kernel, options = gather.gather_kernel, {"num_warps": gather.WARPS}
        constants = dict(S=job.dim, GROUPS=gather.GROUPS, EDGES=job.kernel == "gather edges")
    else:
        kernel, options = backward.combine_kernel, {}
        rows, splits = (1, 16) if job.kernel == "combine few" else (8, 4)
        constants = dict(D=job.dim, BR=rows, BD=128, BI=128, BS=splits, HAS_KOLEO=True)
    vector = "*bf16" if job.precision == "bf16" else "*fp32"

    def types(name: str) -> str:
        if kernel is gather.gather_kernel:
            return {"out_ptr": "*i16", "table_ptr": "*i16", "pixels_ptr": "*u8", "length": "i64"}.get(name, "*i64")
        if name in ("rows_ptr", "cols_ptr", "memory_ptr"):
            return vector
        if name in ("tile_sums_ptr",) or (name == "sums_ptr" and job.kernel == "totals"):
            return "*fp64"
        if name == "counts_ptr":
            return "*i64" if job.kernel == "totals" else "*i32"
        if name in ("best_col_ptr",):
            return "*i32"
        if "labels" in name or name in ("self_index_ptr", "index_ptr", "tile_counts_ptr"):
            return "*i64"
        if name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name in ("margin", "koleo_eps", "distance_eps") else "i32"

    return kernel, types, constants, options


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
    source = hashlib.sha256((text + triton.__version__).encode()).hexdigest()[:16]
    path = Path(triton.knobs.cache.dir) / f"fastirt-aot-{source}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [job for job in todo if job.name not in known]
    with ProcessPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for job, report in zip(missing, pool.map(compile_job, missing)):
            known[job.name] = asdict(report)
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    parser.add_argument("--tables", action="store_true", help="print the tables of gates/known.py instead")
    args = parser.parse_args()
    if INTERPRETED:  # at import the kernels were made for the interpreter: restart without it
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "fastirt.kernels.aot", *sys.argv[1:]], environment)
    todo = [job for job in jobs(tuple(args.arch)) if args.kernel in (None, job.kernel.split()[0])]
    rows = reports(todo)
    if args.tables:
        print(tables(todo, rows))
        return 0
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
