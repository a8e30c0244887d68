"""The benchmark suite on the CPU: what is timed is what is tested, and every figure has its limit beside it."""

import json
import sys

import pytest
import torch

from benchmarks import loss, peers
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.timing import Timing, alternate
from fastirt.kernels import tune
from fastirt.kernels.configs import Row, Tile

CPU = torch.device("cpu")
FLAGS = "loss --rows 16 --slots 50 --dim 32 --dtype fp32 --repeats 2 --device cpu".split()
LIMITS = {"GB/s": 10.0, "bf16": 0.1, "tf32": 0.1, "fp32": 0.1}
FIGURES = {
    "loss",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peak_bytes",
    "GB/s",
    "TFLOP/s",
    "limit_ms",
    "share_of_limit",
    "times_fastirt",
}


def test_loss_end_to_end(tmp_path, capsys):
    out = tmp_path / "results" / "loss.json"
    assert benchmarks_main([*FLAGS, "--out", str(out)]) == 0
    assert "the kernels are left out" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {"device", "torch", "triton", "commit", "date"} <= set(result["environment"])
    assert {"GB/s", "bf16", "tf32", "fp32"} == set(result["limits"])
    assert [row["name"] for row in result["rows"]] == ["plain", "compiled", "metric-learning"]
    for row in result["rows"]:
        assert set(row) >= FIGURES and row["peak_bytes"] is None
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["share_of_limit"] * row["median_ms"] == pytest.approx(row["limit_ms"]) and row["limit_ms"] > 0


@pytest.mark.parametrize("slots", [0, 40])
def test_all_ways_compute_the_same(slots, monkeypatch):
    """The memory without the batch: pytorch-metric-learning has no own-slot rule."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the compiled way is timed end to end above
    whole = peers.inputs(24 + slots, 0, 32, torch.float32, CPU)
    given = dict(z=whole["z"][:24], labels=whole["labels"][:24] % 5, memory=None, memory_labels=None, memory_self=None)
    if slots:
        given |= dict(memory=whole["z"][24:], memory_labels=whole["labels"][24:] % 5)
    found = {name: peers.step(given, way)() for name, way in peers.losses("nonzero_mean", CPU, 32).items()}
    assert {"plain", "metric-learning"} <= set(found)  # fastirt under the interpreter, where that is on
    for name, (value, gradient) in found.items():
        torch.testing.assert_close(value, found["plain"][0], rtol=1e-5, atol=0)
        if name != "metric-learning":  # it differentiates through its own normalisation
            torch.testing.assert_close(gradient, found["plain"][1], rtol=1e-4, atol=1e-6)


def test_the_compiled_way_computes_the_same():
    given = peers.inputs(16, 50, 32, torch.float32, CPU)
    ways = peers.losses("nonzero_mean", CPU, 32)
    for plain, compiled in zip(peers.step(given, ways["plain"])(), peers.step(given, ways["compiled"])()):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


def test_bytes_and_operations_by_hand():
    """N = 2, M = 3, D = 4, bf16: 5 vectors of 8 bytes with labels of 8 are read twice, 2 gradients of 8 bytes are written;
    2 x 5 similarities of 4 products and 4 sums in each pass, and as many for the weighted sums."""
    assert loss.counts(2, 3, 4, 2) == (2 * 5 * 16 + 2 * 8, 3 * 10 * 8)
    moved, operations = loss.counts(64, 59551, 384, 2)
    assert operations == 6 * 64 * 59615 * 384
    assert moved == 2 * 59615 * (768 + 8) + 64 * 768


def test_a_call_without_memory_left_is_reported():
    def fails():
        raise torch.OutOfMemoryError("too much")

    timed = alternate({"works": lambda: None, "fails": fails}, CPU, repeats=3)
    assert isinstance(timed["works"], Timing) and timed["fails"] == "out of memory"


def test_peers_too_large_for_the_memory_are_not_tried(monkeypatch):
    monkeypatch.setattr(loss, "free_bytes", lambda device: 8 * 8 * 32 - 1)
    rows = loss.measure("anchor_sum", "fp32", 16, 8, 0, limits=LIMITS, device=CPU, repeats=1)
    assert {row["name"]: row["failed"] for row in rows} == dict.fromkeys(
        ("plain", "compiled"), "not tried: too little free memory"
    )
    assert "not tried" in loss._lines(rows)


def test_unknown_part(capsys):
    with pytest.raises(SystemExit) as caught:
        benchmarks_main(["nothing"])
    assert caught.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err


def test_the_tuner_prints_rows_of_the_table():
    tile = Tile(64, 32, 128, 8, 3, out=3, skip=True, waves=2, source="NVIDIA H100")
    line = tune.row("grad", 90, "bf16", 384, 64, tile, "NVIDIA H100")
    assert line.startswith(
        'Row("grad", (90,), "bf16", 384, 64, Tile(64, 32, 128, 8, 3, out=3, skip=True, waves=2, source='
    )
    assert eval(line.removesuffix(",")) == Row("grad", (90,), "bf16", 384, 64, tile)


@pytest.mark.parametrize("kind", ["stats", "grad"])
def test_the_tuner_s_tiles_are_few_and_differ(kind):
    tiles = list(tune.candidates(kind, "bf16", 384, 227 * 1024))
    assert 20 < len(tiles) == len(set(tiles)) < 500


def test_the_tuner_needs_a_gpu(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["tune"])
    assert tune.main() == 1
    assert capsys.readouterr().err.splitlines() == ["fastirt.kernels.tune: needs a GPU, and TRITON_INTERPRET unset"]
