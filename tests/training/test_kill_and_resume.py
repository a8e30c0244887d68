"""Killed anywhere, a run goes on as if it had not been: real processes, compared bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, TINY, assert_same_weights, folder_flags, read_log, read_metrics

# Runs `fastirt train` and kills itself at the point named by its first two arguments.
DRIVER = """
import os, signal, sys
import fastirt.training.checkpoint as checkpoint
from fastirt.cli import main
from fastirt.step.train_step import TrainStep

kind, at = sys.argv[1], int(sys.argv[2])
forward, save_file = TrainStep.__call__, checkpoint.save_file

def step(self, batch):
    forward(self, batch)
    if batch.step == at and kind in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)

def half_a_save(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if kind == "save" and f"{at:08d}" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

TrainStep.__call__, checkpoint.save_file = step, half_a_save
sys.exit(main(sys.argv[3:]))
"""


FLAGS = (
    "--recipe unofficial --max-iter 40 --batch-size 16 --m 2 --lr 1e-3 --rank 1 --logging-freq 4 --save-freq 10 "
    "--encoder-momentum 0.9 --drop 0.1 --memory-start 5 --eval-freq 20"
).split()


def start(out: Path, data: Path, kind: str = "none", at: int = 0) -> subprocess.Popen:
    train = ["train", *folder_flags(data), "--output-dir", str(out), "--resume", *TINY, *FLAGS]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, kind, str(at), *train],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def timeless(run: Path) -> list[dict]:
    clocks = ("imgs_per_s", "mfu", "input_wait", "seconds_left")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_log(run)]


KILLS = [
    ("kill", 3, -9),
    ("kill", 16, -9),
    ("save", 20, -9),
    ("kill", 21, -9),
    ("term", 23, 143),
    ("save", 30, -9),  # no evaluation waits for this one: the loop goes on meanwhile
    ("kill", 31, -9),
    ("none", 0, 0),
]  # how, at which step, with which exit code


@pytest.mark.slow
def test_killed_again_and_again_equals_undisturbed(tmp_path, image_folder):
    # One unreadable image: its replacement must survive resumption too.
    bad = next((image_folder / "train").iterdir()) / "9.jpg"
    bad.write_bytes((image_folder / "train/class00/0.jpg").read_bytes()[:300])
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    try:
        undisturbed = start(calm, image_folder)
        for kind, at, code in KILLS:
            returned, output = finish(start(killed, image_folder, kind, at))
            assert returned == code, output
            if kind == "term":
                assert "step_00000024.safetensors" in output
                assert "--resume" in output
        returned, output = finish(undisturbed)
        assert returned == 0, output
    finally:
        bad.unlink()
    for name in ("model.safetensors", "checkpoints/step_00000040.safetensors"):
        assert_same_weights(killed / name, calm / name)
    assert timeless(killed) == timeless(calm)
    assert read_metrics(killed) == read_metrics(calm)
    _, *named = (killed / "bad_pictures.csv").read_text().splitlines()
    assert len(named) == 1
    assert str(bad) in named[0]
    assert not list((killed / "checkpoints").glob(".*"))
