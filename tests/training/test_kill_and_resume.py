"""Killed anywhere, a run goes on as if it had not been: real processes, compared bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import TINY

# Runs `fastirt train` and kills itself at the point named by its first two arguments.
DRIVER = """
import os, signal, sys
import fastirt.training.checkpoint as checkpoint
from fastirt.cli import main
from fastirt.step.train_step import TrainStep

kind, at = sys.argv[1], int(sys.argv[2])
forward, save_file = TrainStep.forward, checkpoint.save_file

def step(self, batch):
    forward(self, batch)
    if batch.step == at and kind in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)

def half_a_save(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if kind == "save" and f"{at:08d}" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

TrainStep.forward, checkpoint.save_file = step, half_a_save
sys.exit(main(sys.argv[3:]))
"""


def start(out: Path, pictures: Path, kind: str = "none", at: int = 0) -> subprocess.Popen:
    command = [
        sys.executable,
        "-c",
        DRIVER,
        kind,
        str(at),
        "train",
        "--dataset",
        "folder",
        "--data-path",
        str(pictures),
        "--output-dir",
        str(out),
        "--resume",
        *TINY,
        "--recipe",
        "unofficial",
        "--max-iter",
        "40",
        "--batch-size",
        "16",
        "--m",
        "2",
        "--lr",
        "1e-3",
        "--rank",
        "1",
        "--logging-freq",
        "4",
        "--save-freq",
        "10",
        "--encoder-momentum",
        "0.9",
        "--drop",
        "0.1",
        "--memory-start",
        "5",
        "--eval-freq",
        "20",
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2]
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def timeless(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    clocks = ("imgs_per_s", "mfu", "input_wait", "seconds_left")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


@pytest.mark.slow
def test_killed_again_and_again_equals_undisturbed(tmp_path, pictures):
    bad = (
        next((pictures / "train").iterdir()) / "9.jpg"
    )  # one unreadable image: its replacement must survive resumption too
    bad.write_bytes((pictures / "train/class00/0.jpg").read_bytes()[:300])
    try:
        calm = start(tmp_path / "calm", pictures)
        out = tmp_path / "killed"
        for kind, at, code in [
            ("kill", 3, -9),
            ("kill", 16, -9),
            ("save", 20, -9),
            ("kill", 21, -9),
            ("term", 23, 143),
            ("kill", 31, -9),
            ("none", 0, 0),
        ]:
            returned, output = finish(start(out, pictures, kind, at))
            assert returned == code, output
            if kind == "term":
                assert "step_00000024.safetensors" in output and "--resume" in output
        returned, output = finish(calm)
        assert returned == 0, output
    finally:
        bad.unlink()
    for name in ("model.safetensors", "checkpoints/step_00000040.safetensors"):
        a, b = load_file(tmp_path / "calm" / name), load_file(out / name)
        assert a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
    assert timeless(out / "log.jsonl") == timeless(tmp_path / "calm/log.jsonl")
    assert json.loads((out / "metrics.json").read_text()) == json.loads((tmp_path / "calm/metrics.json").read_text())
    named = (out / "bad_pictures.csv").read_text().splitlines()
    assert len(named) == 2 and str(bad) in named[1]
    assert not list((out / "checkpoints").glob(".*"))
