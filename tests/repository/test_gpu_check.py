"""scripts/gpu_check.sh without a GPU: its flow and summary with a Python that only pretends, a
rehearsal on a fake device, and whether its stages fit their time."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import main as benchmarks_main
from tests.helpers import ROOT

PRETENDS = """#!/usr/bin/env bash
case "$*" in
    *fastirt.objective.self_check*) echo "self-check gather_views ok" ;;
    -c*import\\ fastirt*) exit 1 ;;
    -c*) exit 0 ;;
    --version) echo "Python 0" ;;
    *tests/step/test_engine.py*"--shard 1/"*)
        echo "tests/step/test_engine.py::test_one PASSED [ 50%]"
        echo "SKIPPED [2] tests/step/test_engine.py:1: needs NVIDIA DALI"
        echo "1 passed, 2 skipped in 0.01s" ;;
    *"benchmarks step loss --batch-size 64"*)
        echo "step       + CUDA graph    12345 imgs/s  [batch_size=64]"
        echo "step       graph, apex FusedAdam   not run: UserError: no apex"
        cat "${PYTHONPATH%%:*}/sitecustomize.py"
        echo "RuntimeError: as the last line"
        echo '{"part": "step"}' >> "${@: -1}"
        exit 1 ;;
    *"tests/kernels/test_parts.py --shard 1/"*)
        echo "tests/kernels/test_edges.py::test_two FAILED [  1%]"
        echo "tests/kernels/test_edges.py::test_three "
        exec sleep 60 ;;
esac
"""


def check(out, **environment):
    words = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(out)]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH")}
    return subprocess.run(words, env={**kept, **environment}, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = check(tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "no usable GPU" in done.stderr


@pytest.mark.slow
def test_stages_are_bounded_and_the_summary_says_what_happened(tmp_path):
    folder, out = tmp_path / "bin", tmp_path / "out"
    folder.mkdir()
    for name, text in (("python", PRETENDS), ("broken", "#!/bin/sh\nexit 1\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    done = check(out, PATH=f"{folder}:{os.environ['PATH']}", PYTHON=str(folder / "broken"), LIMIT="14")
    assert done.returncode == 1, done.stderr
    assert {path.name for path in out.iterdir()} == {"log.txt", "results.jsonl", "machine.txt", "summary.txt"}
    summary = (out / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    stages, rest = summary.split("## Not run")
    missing, rest = rest.split("## Failures")
    failures, figures = rest.split("## Figures")
    for words in (
        "test-smoke: passed",
        "self-check: passed",
        "bench-step-loss: failed (exit 1)",
        "test-kernels: cut off after",
        "bench-train-input: not run: no time left",
    ):
        assert words in stages
    assert re.search(r"test-smoke: passed.* 1 passed, 2 skipped, in \d+ processes", stages)
    for words in ("tests/step/test_engine.py:1: needs NVIDIA DALI", "no apex", "bench-train-input"):
        assert words in missing
    assert failures.split("\n")[1:3] == [
        "RuntimeError: as the last line",
        "tests/kernels/test_edges.py::test_two FAILED [  1%]",
    ]
    assert "12345 imgs/s" in figures and "gather_views ok" in figures and "apex" not in figures
    log = (out / "log.txt").read_text()
    assert "tests/kernels/test_edges.py::test_three" in log
    assert f"fastirt.__path__.append('{ROOT}')" in log


REHEARSES = """#!/usr/bin/env bash
[ "$1" = --version ] && exec {python} --version
exec {python} -m tests.fake_cuda.rehearsal "$@"
"""
# Seconds on a slow core: Python, torch and CUDA; one kernel, of which 11 took 25.
IMPORTS, COMPILE = 10, 2.3
# What needs values or processes that no fake device has.
NEVER_REHEARSED = r"(input|train|retrieval) .*not run:|bench-[\w-]+: not run: (python|minutes)"


@pytest.mark.sweep
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_rehearsal_on_a_fake_device(tmp_path):
    """Every stage runs to its end: benchmarks take the GPU's branches on tensors without values,
    tests are collected. `report` takes the folder as it is."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(REHEARSES.format(python=sys.executable))
    python.chmod(0o755)
    done = check(out, PYTHON=str(python), REHEARSAL_PYTHON=str(python), OMP_NUM_THREADS="1", LIMIT="900")
    stages, rest = (out / "summary.txt").read_text().split("## Not run")
    missing, figures = rest.split("## Failures")
    assert "self-check: failed (exit 1)" in stages, stages  # no value is right
    passed = re.findall(r"^([\w-]+): passed", stages, re.M)
    assert passed == [name for name, _ in budget() if name != "self-check"], done.stdout
    unexpected = [line for line in missing.splitlines() if line.strip() and not re.search(NEVER_REHEARSED, line)]
    assert not unexpected
    for words in ("+ CUDA graph", "graph, bf16 weights", "fastirt graph", "cuDNN", "fc1, forward", "fastirt, host"):
        assert words in figures
    assert benchmarks_main(["report", str(out)]) == 0


def budget() -> list[tuple[str, int]]:
    """(name, seconds) of each stage in the script, in order."""
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    prefix = {"stage": "", "bench": "bench-", "tests": "test-", "side_by_side": "test-"}
    found = re.findall(r"^(stage|bench|tests|side_by_side) ([\w-]+) (\d+) ", text, re.M)
    return [(prefix[kind] + name, int(seconds)) for kind, name, seconds in found]


def test_the_stages_fit_into_the_time():
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    limit = int(re.search(r"LIMIT:-(\d+)", text).group(1))
    start = int(re.search(r"^deadline=(\d+)", text, re.M).group(1))
    assert start + sum(seconds for _, seconds in budget()) <= limit <= 540
    compiled = json.loads((ROOT / "tests" / "kernels" / "specializations.json").read_text())
    for name, counted in compiled.items():
        assert IMPORTS + COMPILE * counted["most_of_one_process"] <= dict(budget())[f"test-{name}"], name
