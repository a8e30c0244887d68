"""The gates of `fastirt.kernels.aot`: on short texts, on planted kernels, and their exceptions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastirt
from fastirt.kernels.gates import judge, known, texts
from fastirt.kernels.gates.judge import Report, Texts
from fastirt.kernels.variants.jobs import Job, jobs
from fastirt.kernels.variants.tile_table import Tile

TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [2, 2], threadsPerWarp = [4, 8], warpsPerCTA = [4, 2], order = [1, 0]}>
#blocked1 = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [8], order = [0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 8], instrShape = [16, 8]}>
module {
  tt.func public @kernel() {
    %0 = ttg.async_wait %a {num = 0 : i32} loc(#loc1)
    %1:2 = scf.for %i = %c0 to %n step %c1 iter_args(%x = %cst) -> (f32)  : i32 {
      %2 = ttg.async_wait %b, %c {num = 3 : i32} loc(#loc1)
      %3 = ttng.warp_group_dot %d, %e, %s {isAsync = true} : !a * !b -> tensor<64x64xf32, #mma> loc(#loc)
      %4 = scf.if %p -> (f32) {
        %5 = ttg.async_wait %f {num = 0 : i32} loc(#loc1)
        scf.yield %5 : f32 loc(#loc)
      } else {
        scf.yield %4 : f32 loc(#loc)
      } loc(#loc)
      %6 = tt.dot %g, %h, %s, inputPrecision = tf32 : tensor<64x8xf32> * tensor<8x64xf32> -> tensor<64x64xf32, #mma1>
      scf.yield %3 : f32 loc(#loc)
    } loc(#loc)
    %7 = ttg.async_wait %a {num = 0 : i32} loc(#loc1)
    %8 = tt.dot %g, %h, %s : tensor<32x8xf32> * tensor<8x32xf32> -> tensor<32x32xf32, #blocked> loc(#loc)
    %9 = tt.dot %g, %h, %s : tensor<16x8xf32> * tensor<8x32xf32> -> tensor<16x32xf32, #blocked> loc(#loc)
  }
}
"""
SASS = """
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
.L_x_2:
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/              @!P2 BRA `(.L_x_3) ;
        /*0060*/                   NOP ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   FFMA R1, R2, R3, R4 ;
        /*0090*/              @!UP0 BRA `(.L_x_3) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
        /*00c0*/                   NOP ;
"""


def test_waits_are_those_inside_loops():
    assert texts.waits_in_loops(TTGIR) == [3, 0]
    assert texts.waits_in_loops("") == []


def test_a_product_repeats_where_the_warps_cover_more_than_the_tile():
    found = texts.dots(TTGIR)
    assert [(d.rows, d.columns, d.covered_rows, d.covered_columns) for d in found] == [
        (64, 64, 128, 64), (64, 64, 16, 64), (32, 32, 32, 32), (16, 32, 32, 32),
    ]  # fmt: skip
    assert [d.repeats for d in found] == [2, 1, 1, 2]


def test_loads_of_bytes():
    ptx = "ld.global.b8 a; @%p1 ld.global.L1::evict_last.u8 b; ld.global.v4.b8 c; ld.shared.b8 d; ld.global.b32 e;"
    assert texts.byte_loads(ptx) == 3
    assert texts.byte_loads("st.global.b8 a; ld.param.b8 b; ld.global.v4.b32 c;") == 0


def test_instructions_of_the_main_loop():
    """The shortest outermost loop with products; the others are inside it, or have none."""
    assert texts.main_loop(SASS) == 2  # FFMA and its branch
    assert texts.main_loop(SASS.replace("FFMA", "FADD")) == 4  # without NOP
    assert texts.main_loop(SASS.replace("FFMA", "FADD").replace("HGMMA", "MOV")) is None
    assert texts.instructions(SASS) == 10  # without NOP and the branch to itself


STATS = Job("stats", 90, "bf16", 384, Tile(64, 64, 64, 4, 2))


def findings(job=STATS, each=None, **given):
    return judge.findings(job, each, Texts(**given))


def test_ceilings_and_exceptions(monkeypatch):
    monkeypatch.setattr(judge, "CEILINGS", {judge.ceiling_key(STATS): 50.0})
    assert findings(each=50.0 * known.MARGIN - 0.1) == {}
    assert findings(each=50.0 * known.MARGIN + 0.1) == {"instructions": "51.6 instructions each, 50.0 before"}
    assert findings(Job("grad", 90, "bf16", 384, STATS.tile), 1000.0) == {}  # not in the table
    assert findings() == {"instructions": "no loop with products"}
    assert set(findings(each=1.0, ttgir=TTGIR)) == {"wait", "warps"}
    assert set(findings(Job("stats", 90, "bf16", 384, Tile(64, 64, 64, 4, 1)), 1.0, ttgir=TTGIR)) == {"warps"}

    def judged():
        report = Report("job", matrix={"wgmma.mma_async": 1})
        judge.judge(STATS, report, Texts(TTGIR, sass=SASS), 0)
        return report

    monkeypatch.setattr(judge, "EXCEPTIONS", {("wait", "stats", 90): "64x64x64w4s2"})
    report = judged()
    assert report.known == ["wait"] and report.faults == ["the warps compute each result of a product 2 times"]
    assert judge.stale([STATS], [report], whole=False) == []
    monkeypatch.setattr(judge, "EXCEPTIONS", {("wait", "stats", 90): "64x64x64w4s2", ("bytes", "stats", 90): "x"})
    assert judge.stale([STATS], [report], whole=False) == []  # no kernel with this tile was compiled
    assert judge.stale([STATS], [report], whole=True) == ["known.py: nothing needs 'bytes stats 90 x'"]
    report.found.clear()
    assert judge.stale([STATS], [report], whole=False) == ["known.py: nothing needs 'wait stats 90 64x64x64w4s2'"]
    monkeypatch.setattr(judge, "CEILINGS", {"gone": 1.0})
    assert "known.py: nothing needs 'gone'" in judge.stale([STATS], [report], whole=True)


def test_every_exception_has_a_reason_and_every_ceiling_a_kernel():
    assert {gate for gate, *_ in known.EXCEPTIONS} == set(known.REASONS)
    keys = {judge.ceiling_key(job) for job in jobs()}
    assert known.CEILINGS.keys() <= keys
    assert {key for key in keys if key.split()[0] in ("stats", "grad", "gather", "count")} == known.CEILINGS.keys()


def test_the_tables_are_python():
    report = Report("job", each=12.34, found={"wait": "", "instructions": ""})
    exceptions, ceilings = judge.tables([STATS], [report]).split("\n\n")
    assert eval(f"{{{exceptions}}}") == {("wait", "stats", 90): "64x64x64w4s2"}
    assert eval(f"{{{ceilings}}}") == {judge.ceiling_key(STATS): 12.3}


@pytest.mark.slow
def test_each_gate_notices_a_planted_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.planted"], capture_output=True, text=True, timeout=300, cwd=root,
        env={**environment, "PYTHONPATH": str(Path(fastirt.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["clean"] == {} and found["four warps"] == {}
    assert "wait" in found["mask by label"]
    assert found["eight warps"] == {"warps": "the warps compute each result of a product 2 times"}
    assert set(found["more work"]) == {"instructions"} and set(found["bytes"]) == {"bytes"}
