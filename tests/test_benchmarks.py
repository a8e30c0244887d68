"""The benchmark suite on the CPU: what is timed is what is tested, and every figure has its limit beside it."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import loss
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.timing import Timing, alternate

CPU = torch.device("cpu")


def test_loss_end_to_end(tmp_path, capsys):
    out = tmp_path / "results" / "loss.json"
    flags = ["--rows", "16", "--slots", "0", "50", "--dim", "32", "--dtype", "fp32", "--repeats", "2", "--device", "cpu"]
    assert benchmarks_main(["loss", *flags, "--out", str(out)]) == 0
    assert "the kernels are left out" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {"device", "torch", "triton", "commit", "date"} <= set(result["environment"])
    assert {"GB/s", "bf16", "tf32", "fp32"} == set(result["limits"])
    assert {row["name"] for row in result["rows"]} >= {"plain", "compiled", "metric-learning"} and len(result["rows"]) >= 6
    for row in result["rows"]:
        assert row["median_ms"] > 0 and 0 < row["share_of_limit"] and row["limit_ms"] > 0


def test_all_ways_compute_the_same():
    """Without a memory, where pytorch-metric-learning has no own-slot rule to lack."""
    given = loss.inputs(24, 0, 32, torch.float32, CPU)
    found = {name: loss.step(given, way)() for name, way in loss.losses("nonzero_mean", CPU).items()}
    assert {"fastirt", "plain", "compiled", "metric-learning"} <= set(found)  # fastirt under the interpreter
    for name, (value, gradient) in found.items():
        torch.testing.assert_close(value, found["plain"][0], rtol=1e-5, atol=0, msg=name)
        if name != "metric-learning":  # it differentiates through its own normalisation
            torch.testing.assert_close(gradient, found["plain"][1], rtol=1e-4, atol=1e-6)


def test_bytes_and_operations_of_the_paper_s_batch():
    moved, operations = loss.counts(64, 59551, 384, 2)
    assert operations == 6 * 64 * 59615 * 384
    assert moved == 2 * 59615 * (768 + 8) + 64 * 768


def test_a_call_without_memory_left_is_reported():
    def fails():
        raise torch.OutOfMemoryError("too much")

    timed = alternate({"works": lambda: None, "fails": fails}, CPU, repeats=3)
    assert isinstance(timed["works"], Timing) and timed["fails"] == "out of memory"


def test_unknown_part(capsys):
    with pytest.raises(SystemExit) as caught:
        benchmarks_main(["nothing"])
    assert caught.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err


def test_the_tuner_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "fastirt.kernels.tune"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines() == ["fastirt.kernels.tune: needs a GPU, and TRITON_INTERPRET unset"]
