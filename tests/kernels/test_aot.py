"""Every kernel in every default configuration, compiled for GPUs that are not here."""

import os
import subprocess
import sys

from fastirt.kernels.aot import Job
from fastirt.kernels.gates.judge import FLOAT_ATOMIC, Report, Texts, judge
from fastirt.kernels.tile_table import Tile


def test_all_compile_for_sm_80_90_and_100_without_a_fault():
    """No spill, no serialised wgmma, shared memory within the target's, matrix instructions, no
    floating-point atomic; what the gates find is an exception, and every exception is needed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "fastirt.kernels.aot"], capture_output=True, text=True, timeout=900, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1].endswith(" 0 at fault") and int(lines[-1].split()[0]) == len(lines) - 2 > 50
    for arch, instruction in (("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        assert all(instruction in line for line in lines if f"{arch} bf16 D=384" in line)


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
