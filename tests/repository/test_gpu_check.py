"""scripts/gpu_check.sh without a GPU, and its flow and summary with a fake Python."""

import os
import subprocess

import pytest
import torch

from tests.helpers import ROOT

PRETENDS = """#!/usr/bin/env bash
case "$*" in
    -c*import\\ fastirt*) exit 1 ;;
    -c*) exit 0 ;;
    --version) echo "Python 0" ;;
    *tests/step/test_engine.py*)
        echo "tests/step/test_engine.py::test_one PASSED [ 50%]"
        echo "SKIPPED [2] tests/step/test_engine.py:1: needs NVIDIA DALI"
        echo "1 passed, 2 skipped in 0.01s" ;;
    *"benchmarks step --batch-size 64"*)
        echo "step       + CUDA graph    12345 imgs/s  [batch_size=64]"
        echo "step       graph, apex FusedAdam   not run: UserError: no apex"
        cat "${PYTHONPATH%%:*}/sitecustomize.py"
        echo "RuntimeError: as the last line"
        echo '{"part": "step"}' >> "${@: -1}"
        exit 1 ;;
    *tests/kernels/test_edges.py*)
        echo "tests/kernels/test_edges.py::test_two FAILED [  1%]"
        echo "tests/kernels/test_edges.py::test_three "
        exec sleep 60 ;;
esac
"""


def check(out, **environment):
    words = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(out)]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH")}
    return subprocess.run(words, env={**kept, **environment}, capture_output=True, text=True, timeout=120)


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
        "1 passed, 2 skipped in 0.01s",
        "bench-step: failed (exit 1)",
        "test-kernels: cut off after",
        "bench-train: not run: no time left",
    ):
        assert words in stages
    for words in ("tests/step/test_engine.py:1: needs NVIDIA DALI", "no apex", "bench-train"):
        assert words in missing
    assert failures.split("\n")[1:3] == [
        "RuntimeError: as the last line",
        "tests/kernels/test_edges.py::test_two FAILED [  1%]",
    ]
    assert "12345 imgs/s" in figures and "apex" not in figures
    log = (out / "log.txt").read_text()
    assert "tests/kernels/test_edges.py::test_three" in log
    assert f"fastirt.__path__.append('{ROOT}')" in log
