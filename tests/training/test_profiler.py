"""`--profile`, MFU and input wait: numbers that add up."""

import json
import logging
import time

import pytest
import torch

from fastirt.cli import main
from fastirt.config.options import ModelConfig
from fastirt.model.build import build_encoder
from fastirt.model.flops import peak_flops, training_flops
from fastirt.step.train_step import PHASES
from fastirt.training.throughput import Throughput
from tests.helpers import TINY


def run(pictures, folder, *flags):
    words = ["train", "--dataset", "folder", "--data-path", str(pictures), "--output-dir", str(folder), *TINY]
    return main([*words, "--batch-size", "8", "--rank", "1", "--logging-freq", "4", *flags])


def test_a_profile_names_where_the_time_went(pictures, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fastirt"):
        assert run(pictures, tmp_path / "run", "--profile", "4", "--max-iter", "12") == 0
    lines = [r.getMessage().removeprefix("profile: ") for r in caplog.records if r.getMessage().startswith("profile")]
    total = float(lines[0].split()[0])
    spent = {line[:10].strip(): float(line[10:].split()[0]) for line in lines[1:-1]}
    assert list(spent) == ["input wait", *PHASES, "other"]
    assert sum(spent.values()) == pytest.approx(total, rel=0.5) and "most of it is" in lines[-1]
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 4


def test_a_profiled_run_trains_as_any_other(pictures, tmp_path):
    logs = []
    for name, flags in (("plain", []), ("profiled", ["--profile", "3"])):
        assert run(pictures, tmp_path / name, "--max-iter", "12", *flags) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([row.get("loss", row.get("recall@1")) for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_a_run_too_short_to_profile_says_so(pictures, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fastirt"):
        assert run(pictures, tmp_path / "run", "--profile", "9", "--max-iter", "6") == 0
    assert "the run ended before that many steps" in caplog.text and not (tmp_path / "run" / "trace.json").exists()


def test_logs_have_utilisation_and_input_wait(pictures, tmp_path):
    assert run(pictures, tmp_path / "run", "--max-iter", "8") == 0
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert 0 < row["mfu"] < 1 and 0 <= row["input_wait"] <= 1 and row["imgs_per_s"] > 0


def test_throughput_by_hand():
    speed = Throughput(batch_size=10, flops=4.0, peak=1e4, device=torch.device("cpu"))

    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    for _ in speed.waiting(slow()):
        time.sleep(0.02)
        speed.tick()
    found = speed.read(steps_left=30)()
    assert found["input_wait"] == pytest.approx(0.5, abs=0.2)
    assert found["mfu"] == pytest.approx(found["imgs_per_s"] * 4 / 1e4, rel=0.01)
    assert found["seconds_left"] == pytest.approx(300 / found["imgs_per_s"], abs=0.06)  # said in tenths
    assert speed.read(5)()["imgs_per_s"] == 0


def test_utilisation_is_a_share_even_where_the_peak_was_guessed_too_low():
    speed = Throughput(batch_size=10, flops=4.0, peak=1e-3, device=torch.device("cpu"))
    time.sleep(0.001)
    speed.tick()
    assert speed.read(1)()["mfu"] == 1.0


def test_operations_of_deit_small():
    """4.61 GMAC forward, two operations each, three times that for a step: 27.7 G; biases and norms are not counted."""
    encoder = build_encoder(ModelConfig(model="deit_small_patch16_224", weights="scratch"), 224)
    assert training_flops(encoder) == pytest.approx(27.6e9, rel=0.005)
    assert training_flops(encoder, twin=True) * 3 == training_flops(encoder) * 4
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e9
