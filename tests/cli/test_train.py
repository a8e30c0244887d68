"""`fastirt train` on a tiny model: what a run writes, what it learns, and how it stops."""

import errno
import json
from collections import Counter

import pytest
import torch

from fastirt.images.source import FileSource
from fastirt.step.train_step import TrainStep
from fastirt.training import checkpoint
from fastirt.training.run_log import RunLog
from tests.helpers import (
    folder_flags,
    last_line,
    loss_rows,
    read_config,
    read_log,
    read_metrics,
    run_cli,
    timm_model,
    train_few,
)


def test_a_run_writes_everything_and_can_be_evaluated_again(image_folder, tmp_path, capsys, monkeypatch):
    out, read, reads = tmp_path / "run", FileSource.read, Counter()
    monkeypatch.setattr(FileSource, "read", lambda self, row: reads.update([self.path(row)]) or read(self, row))
    assert train_few(image_folder, out, *"--recipe unofficial --eval-freq 2 --encoder-momentum 0.9".split()) == 0
    # three evaluations and 96 draws from 80 training images
    assert set(reads.values()) == {1} and sum("/test/" in path for path in reads) == 24
    assert "recall@1" in capsys.readouterr().out.lower()
    metrics = read_metrics(out)
    assert {"recall@1", "recall@2", "recall@4", "map@r", "r_precision"} <= set(metrics)
    assert 0 <= metrics["recall@1"] <= metrics["recall@4"] <= 1
    config = read_config(out)
    assert config["recipe"] == "unofficial"
    assert config["optim"]["max_iter"] == 6
    assert config["objective"]["contrastive"] == "nonzero_mean"
    assert [row["step"] for row in loss_rows(out)] == [2, 4, 6]
    for row in loss_rows(out):
        parts = row["contrastive_batch"] + row["contrastive_memory"] + 0.7 * row["koleo"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert [row["step"] for row in read_log(out) if "recall@1" in row] == [2, 4, 6]
    assert list((out / "tensorboard").iterdir())
    assert (out / "model_best.safetensors").is_file()
    saved = [f"step_{step:08d}.safetensors" for step in (4, 6)]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == saved

    stored = checkpoint.load(out / "checkpoints" / saved[-1])["module"]
    for name, value in timm_model(out / "model.safetensors").state_dict().items():
        assert torch.equal(value, stored[f"encoder.vit.{name}"]), name

    data = [*folder_flags(image_folder), *"--rank 1 4 --device cpu".split()]
    weights = out / "model.safetensors"
    for number, words in enumerate([[out], [weights, *data], ["--weights", weights, *data]]):
        again = tmp_path / f"again{number}"
        assert run_cli("evaluate", *words, "--output-dir", again) == 0
        measured = read_metrics(again)
        for name in ("recall@1", "recall@4", "map@r"):
            assert measured[name] == pytest.approx(metrics[name], abs=1e-6)


def test_max_iter_zero_only_evaluates(image_folder, tmp_path):
    out = tmp_path / "run"
    assert train_few(image_folder, out, "--max-iter", "0") == 0
    assert read_config(out)["method"] == "irt-o"
    assert not (out / "checkpoints").exists()
    assert (out / "metrics.json").exists()
    assert run_cli("evaluate", out) == 0  # also of a run that never trained


def test_training_learns_the_training_classes(image_folder, tmp_path):
    flags = "--method irt-l --max-iter 40 --logging-freq 10 --memory-ratio 0"
    assert train_few(image_folder, tmp_path / "run", *flags.split()) == 0
    losses = [row["contrastive_batch"] for row in loss_rows(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]


def test_a_non_finite_loss_stops_the_run_and_names_step_images_and_checkpoint(
    image_folder, tmp_path, capsys, monkeypatch
):
    forward = TrainStep.__call__

    def poisoned(self, batch):
        if batch.step == 4:
            with torch.no_grad():
                self.forward_pass.objective.lambda_reg = float("nan")
        forward(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    out = tmp_path / "run"
    assert train_few(image_folder, out, "--logging-freq", "50") == 2
    error = last_line(capsys)
    for words in ("step 5", "class", "step_00000003.safetensors"):
        assert words in error
    assert checkpoint.latest(out).name == "step_00000003.safetensors"
    assert len(json.loads((out / "non_finite.json").read_text())["pictures"]) == 16
    assert not (out / "model.safetensors").exists()


def test_a_packed_store_trains_logs_elsewhere_and_a_report_names_the_run(image_folder, tmp_path, capsys):
    store, run = tmp_path / "store", tmp_path / "run"
    flags = [*folder_flags(image_folder), *"--recipe unofficial --resize-size 18 --workers 1".split()]
    assert run_cli("pack", store, *flags) == 0
    assert train_few(image_folder, run, "--packed", store, "--log-dir", tmp_path / "logs") == 0
    assert list((tmp_path / "logs/folder").iterdir())
    assert not (run / "tensorboard").exists()
    assert train_few(image_folder, tmp_path / "other", "--packed", store, "--resize-size", "20") == 2
    assert "--resize-size 20" in last_line(capsys)
    assert run_cli("report", run) == 0
    assert "irt-r (unofficial)" in capsys.readouterr().out


def test_what_the_machine_refuses_in_the_middle_of_a_run_is_one_line(image_folder, tmp_path, monkeypatch, capsys):
    """A log that finds no room: no traceback, and the last checkpoint is there to go on from."""
    row = RunLog.row

    def full(self, values):
        if values["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        row(self, values)

    monkeypatch.setattr(RunLog, "row", full)
    assert train_few(image_folder, tmp_path / "run") == 2
    error = last_line(capsys)
    assert error.startswith("fastirt train: error: ")
    assert "log.jsonl: No space left on device" in error
    assert "--resume" in error
    monkeypatch.undo()
    assert train_few(image_folder, tmp_path / "run", "--resume") == 0
    assert [row["step"] for row in loss_rows(tmp_path / "run")] == [2, 4, 6]
