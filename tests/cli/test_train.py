"""`fastirt train` and `fastirt evaluate` end to end on a little model: what a run writes, and what it refuses."""

import errno
import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastirt.cli import main
from fastirt.step.train_step import TrainStep
from fastirt.training import checkpoint
from tests.helpers import TINY

FEW = [
    "--max-iter",
    "6",
    "--batch-size",
    "16",
    "--m",
    "2",
    "--lr",
    "1e-3",
    "--logging-freq",
    "2",
    "--save-freq",
    "3",
    "--rank",
    "1",
    "2",
    "4",
]


def train(pictures, out, *flags):
    return main(
        ["train", "--dataset", "folder", "--data-path", str(pictures), "--output-dir", str(out), *TINY, *FEW, *flags]
    )


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_writes_everything_and_can_be_evaluated_again(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(pictures, out, "--recipe", "unofficial", "--eval-freq", "2", "--encoder-momentum", "0.9") == 0
    assert "recall@1" in capsys.readouterr().out.lower()
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"recall@1", "recall@2", "recall@4", "map@r", "r_precision"} <= set(metrics) and 0 <= metrics[
        "recall@1"
    ] <= metrics["recall@4"] <= 1
    config = json.loads((out / "config.json").read_text())["config"]
    assert (
        config["recipe"] == "unofficial"
        and config["optim"]["max_iter"] == 6
        and config["objective"]["contrastive"] == "nonzero_mean"
    )
    steps = [r for r in rows(out) if "loss" in r]
    assert [r["step"] for r in steps] == [2, 4, 6]
    assert all(
        r["loss"] == pytest.approx(r["contrastive_batch"] + r["contrastive_memory"] + 0.7 * r["koleo"], rel=1e-5)
        for r in steps
    )
    assert [r["step"] for r in rows(out) if "recall@1" in r] == [2, 4, 6]
    assert list((out / "tensorboard").iterdir()) and (out / "model_best.safetensors").is_file()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step_00000004.safetensors",
        "step_00000006.safetensors",
    ]

    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        img_size=16,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        checkpoint_path=str(out / "model.safetensors"),
    )
    state = checkpoint.load(out / "checkpoints/step_00000006.safetensors")
    assert all(torch.equal(value, state["module"][f"encoder.vit.{name}"]) for name, value in model.state_dict().items())

    data = ["--dataset", "folder", "--data-path", str(pictures), "--rank", "1", "4", "--device", "cpu"]
    weights = str(out / "model.safetensors")
    for number, words in enumerate([[str(out)], [weights, *data], ["--weights", weights, *data]]):
        again = tmp_path / f"again{number}"
        assert main(["evaluate", *words, "--output-dir", str(again)]) == 0
        measured = json.loads((again / "metrics.json").read_text())
        assert all(
            measured[name] == pytest.approx(metrics[name], abs=1e-6) for name in ("recall@1", "recall@4", "map@r")
        )


def test_max_iter_zero_only_evaluates(pictures, tmp_path):
    assert train(pictures, tmp_path / "run", "--max-iter", "0") == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["method"] == "irt-o"
    assert not (tmp_path / "run/checkpoints").exists() and (tmp_path / "run/metrics.json").exists()
    assert main(["evaluate", str(tmp_path / "run")]) == 0  # also of a run that never trained


def test_training_learns_the_training_classes(pictures, tmp_path):
    assert (
        train(
            pictures,
            tmp_path / "run",
            "--method",
            "irt-l",
            "--max-iter",
            "40",
            "--logging-freq",
            "10",
            "--memory-ratio",
            "0",
        )
        == 0
    )
    losses = [r["contrastive_batch"] for r in rows(tmp_path / "run") if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]


def test_a_non_finite_loss_stops_the_run_and_names_step_pictures_and_checkpoint(
    pictures, tmp_path, capsys, monkeypatch
):
    forward = TrainStep.forward

    def poisoned(self, batch):
        if batch.step == 4:
            with torch.no_grad():
                self.objective.lambda_reg = float("nan")
        forward(self, batch)

    monkeypatch.setattr(TrainStep, "forward", poisoned)
    out = tmp_path / "run"
    assert train(pictures, out, "--logging-freq", "50") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "in step 5" in error and "class" in error and "step_00000003.safetensors" in error
    assert checkpoint.latest(out).name == "step_00000003.safetensors"
    assert len(json.loads((out / "non_finite.json").read_text())["pictures"]) == 16
    assert not (out / "model.safetensors").exists()


def test_refusals_are_one_line_with_the_difference(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(pictures, out) == 0
    capsys.readouterr()

    def refused(*flags, saying):
        assert train(pictures, *flags) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert saying in error, error

    refused(out, saying="already holds a run")
    refused(out, "--resume", "--lr", "0.5", saying="lr: 0.001, 0.5")
    refused(
        out, "--resume", "--model-kwargs", "patch_size=8", "embed_dim=48", "depth=1", "num_heads=3", saying="depth=1"
    )
    refused(tmp_path / "other", "--resume", str(tmp_path / "nothing"), saying="no checkpoint there")
    refused(tmp_path / "big", "--batch-size", "96", saying="larger than the memory")
    refused(tmp_path / "m", "--m", "3", saying="--m")
    refused(tmp_path / "o", "--opt", "adahessian", saying="second derivatives")
    refused(tmp_path / "g", "--engine", "graph", saying="--engine graph: needs a GPU")
    refused(tmp_path / "b", "--opt-betas", "0.9", saying="--opt-betas")
    refused(tmp_path / "l", "--log-dir", "/proc/nope", saying="--log-dir")
    refused(tmp_path / "k", "--rank", "1", "500", saying="500")
    blocker = tmp_path / "file"
    blocker.write_text("")
    refused(blocker / "run", saying="cannot write there")
    path = checkpoint.latest(out)
    path.write_bytes(path.read_bytes()[:-10])
    refused(out, "--resume", saying="damaged checkpoint")


OTHER_WAYS = {
    "lion": ["--opt", "lion"],
    "lookahead": ["--opt", "lookahead_adamw"],
    "tuple state": ["--opt", "kron"],
    "dtype state": ["--opt", "adafactorbv"],
    "bf16": ["--precision", "bf16", "--memory-dtype", "bf16"],
    "bf16 weights": ["--precision", "bf16-weights"],
    "gem": ["--pooling", "gem"],
    "pil": ["--loader", "pil"],
    "search": ["--search", "torch"],
    "dropout": ["--drop", "0.2", "--drop-path", "0.2"],
    "no memory": ["--memory-ratio", "0", "--encoder-momentum", "none"],
    "clip": ["--clip-grad", "1", "--sched", "cosine", "--warmup-iter", "2", "--keep", "1"],
    "paper": ["--recipe", "paper"],
    "compile": ["--engine", "compile"],
    "no cache": ["--cache", "none"],
    "layers": ["--model-kwargs", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=3", "attn_drop_rate=0.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_every_way_to_train_resumes_bit_for_bit(pictures, tmp_path, flags):
    assert train(pictures, tmp_path / "a", *flags) == 0
    (tmp_path / "b/checkpoints").mkdir(parents=True)
    if "--keep" in flags:  # the middle is gone: stop there instead
        assert len(list((tmp_path / "a/checkpoints").iterdir())) == 1
        assert train(pictures, tmp_path / "c", *flags, "--keep", "2") == 0
        half = tmp_path / "c/checkpoints/step_00000003.safetensors"
    else:
        half = tmp_path / "a/checkpoints/step_00000003.safetensors"
    middle = half.rename(tmp_path / "b/checkpoints" / half.name)
    assert train(pictures, tmp_path / "b", *flags, "--resume", str(middle)) == 0
    a, b = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_packed_store_logs_elsewhere_and_a_report(pictures, tmp_path, capsys):
    data = ["--dataset", "folder", "--data-path", str(pictures)]
    assert (
        main(
            ["pack", str(tmp_path / "store"), "--recipe", "unofficial", *data, "--resize-size", "18", "--workers", "1"]
        )
        == 0
    )
    assert (
        train(pictures, tmp_path / "run", "--packed", str(tmp_path / "store"), "--log-dir", str(tmp_path / "logs")) == 0
    )
    assert list((tmp_path / "logs/folder").iterdir()) and not (tmp_path / "run/tensorboard").exists()
    assert train(pictures, tmp_path / "other", "--packed", str(tmp_path / "store"), "--resize-size", "20") == 2
    assert "--resize shorter --resize-size 20" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "irt-r (unofficial)" in capsys.readouterr().out


def test_evaluation_with_other_flags_leaves_the_runs_own_figures_alone(pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train(pictures, out) == 0
    before = (out / "metrics.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(out), "--rank", "3"]) == 0
    assert (out / "metrics.json").read_bytes() == before
    assert "recall@3" in json.loads((tmp_path / "outputs/folder/irt-r-vit_tiny_patch16_224-1/metrics.json").read_text())
    assert main(["evaluate", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text()) == json.loads(before)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "typo")]) == 2 and "no such run folder" in capsys.readouterr().err


def test_two_processes_do_not_train_in_one_folder(pictures, tmp_path, capsys):
    from fastirt.training.run_folder import _lock

    (tmp_path / "run").mkdir()
    held = _lock(tmp_path / "run")
    assert train(pictures, tmp_path / "run") == 2
    assert "another process" in capsys.readouterr().err
    held.close()


def test_another_data_set_of_the_same_size_is_not_resumed_on(pictures, tmp_path, capsys):
    from tests.helpers import write_images

    assert train(pictures, tmp_path / "run") == 0
    write_images(tmp_path / "data/train", 10, 8)
    (tmp_path / "data/train/class03").rename(tmp_path / "data/train/class03b")
    write_images(tmp_path / "data/test", 6, 4)
    assert train(tmp_path / "data", tmp_path / "run", "--resume", "--max-iter", "8") == 2
    assert "another data set" in capsys.readouterr().err


def test_longer_training_goes_on_from_a_finished_run(pictures, tmp_path):
    assert train(pictures, tmp_path / "a", "--max-iter", "3") == 0
    assert train(pictures, tmp_path / "a", "--resume", "--max-iter", "6") == 0
    assert train(pictures, tmp_path / "b") == 0
    a, b = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_the_machine_refuses_in_the_middle_of_a_run_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    """A log that finds no room: no traceback, and the last checkpoint is there to go on from."""
    from fastirt.training.run_log import RunLog

    row = RunLog.row

    def full(self, values):
        if values["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        row(self, values)

    monkeypatch.setattr(RunLog, "row", full)
    assert train(pictures, tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("fastirt train: error: ")
        and "log.jsonl: No space left on device" in error
        and "--resume" in error
    )
    monkeypatch.undo()
    assert train(pictures, tmp_path / "run", "--resume") == 0
    assert [r["step"] for r in rows(tmp_path / "run") if "loss" in r] == [2, 4, 6]


def test_weights_of_another_model_are_refused(pictures, tmp_path, capsys):
    """A file of ours says what it is of, and its depth and width would else go under another model's name."""
    assert train(pictures, tmp_path / "run", "--max-iter", "2") == 0
    file = str(tmp_path / "run/model.safetensors")
    words = [
        "--model",
        "deit_small_patch16_224",
        "--dataset",
        "folder",
        "--data-path",
        str(pictures),
        "--device",
        "cpu",
    ]
    for source in ([file], ["--weights", file]):
        assert main(["evaluate", *source, *words, "--output-dir", str(tmp_path / "other")]) == 2
        assert "says that it is of vit_tiny_patch16_224: leave --model out" in capsys.readouterr().err
