"""Every kernel in every default configuration, compiled for GPUs that are not here."""

import itertools
import os
import subprocess
import sys

import pytest

from fastirt.kernels.gates.judge import FLOAT_ATOMIC, Report, Texts, judge
from fastirt.kernels.variants.jobs import ARCHS, COLUMNS, DIMS, PRECISIONS, USES, Job, jobs
from fastirt.kernels.variants.tile_table import TABLE, Tile


def run_aot(*flags, timeout):
    command = [sys.executable, "-m", "fastirt.kernels.aot", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_all_compile_for_sm_80_90_and_100_without_a_fault():
    """No spill, no serialised wgmma, shared memory within the target's, matrix instructions, no
    floating-point atomic; what the gates find is an exception, and every exception is needed.
    """
    lines = run_aot(timeout=1800)
    assert lines[-1].endswith(" 0 at fault") and int(lines[-1].split()[0]) == len(lines) - 2 > 50
    for arch, instruction in (("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        assert all(instruction in line for line in lines if f"{arch} bf16 D=384" in line)


@pytest.mark.sweep
def test_all_combinations_compile_without_a_fault():
    assert run_aot("--all", timeout=4 * 3600)[-1].endswith(" 0 at fault")


def test_the_jobs_are_what_the_command_line_can_launch():
    """With --all every combination; without, every tile, precision, dtype of the memory and use."""
    every = jobs(every=True)
    assert len(every) == len(set(every))
    for arch, kind, precision, columns in itertools.product(ARCHS, USES, PRECISIONS, COLUMNS):
        mine = [j for j in every if (j.arch, j.kernel, j.precision, j.columns) == (arch, kind, precision, columns)]
        found = {(j.dim, j.nonzero, j.use) for j in mine if j.use.memory}
        assert found == set(itertools.product(DIMS, (True, False), [use for use in USES[kind] if use.memory]))
    quick = [job for job in jobs() if job.is_objective]
    assert {job for job in quick if not job.waits_for_labels} <= set(every) and len(quick) < 110
    assert {row.tile for row in TABLE if row.arch != (0,)} == {job.tile for job in quick}
    seen = {(job.kernel, job.arch, job.precision, job.columns) for job in quick}
    assert seen == set(itertools.product(USES, ARCHS, PRECISIONS, COLUMNS))
    uses = {(kind, arch, use) for kind in USES for arch in ARCHS for use in USES[kind]}
    assert {(job.kernel, job.arch, job.use) for job in quick} == uses


def faults(precision="bf16", ptx="", log="", **measured):
    report = Report("job", **{"matrix": {"wgmma.mma_async": 1}, **measured})
    judge(Job("stats", 90, precision, 384, Tile(64, 64, 64, 4, 2)), report, Texts(ptx=ptx, log=log), 0)
    return [fault for fault in report.faults if fault not in report.found.values()]


def test_each_fault_is_found():
    assert faults() == []
    assert faults(spill_bytes=8) == ["spills 8 bytes"]
    assert faults("fp32", spill_bytes=8, matrix={}) == [] and faults("fp32", spill_bytes=5000, matrix={})
    assert "shared memory" in faults(shared_bytes=228 * 1024)[0]
    assert faults(log="warning C7512: wgmma.mma_async instructions are serialized") == ["wgmma is serialised"]
    assert faults(matrix={}) == ["no matrix instruction"]
    assert faults(matrix={"mma.sync": 9}) == ["no wgmma.mma_async"]
    assert faults(ptx="atom.global.add.f32 %f1, [%rd1], %f2;") == ["floating-point atomic"]
    assert FLOAT_ATOMIC.search("red.global.gpu.add.f32") and not FLOAT_ATOMIC.search("atom.global.add.u32")
