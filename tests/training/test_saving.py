"""A checkpoint is written in a thread: values, errors, stops, saves by time."""

import errno
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

import fastirt.commands
from fastirt.errors import UserError
from fastirt.step.train_step import TrainStep
from fastirt.training import checkpoint
from fastirt.training.run_log import RunLog
from fastirt.training.saving import writer
from fastirt.training.saving.snapshot import Snapshot
from tests.helpers import assert_same_weights, last_line, loss_rows, needs_gpu, same_bits, train_few, train_tiny

PATIENCE = 30  # seconds that a held write waits for its release


def saved_steps(run):
    return sorted(int(path.stem.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def after_each_step(monkeypatch, act):
    """Call `act` with the number of steps done, after each step and before the loop goes on."""
    forward = TrainStep.__call__

    def step(self, batch):
        forward(self, batch)
        act(batch.step + 1)

    monkeypatch.setattr(TrainStep, "__call__", step)


@pytest.fixture
def held(monkeypatch):
    """The write of step 3 waits until `go` is set; `steps` were done while it waited."""
    save_file = checkpoint.save_file
    found = SimpleNamespace(go=threading.Event(), writing=threading.Event(), steps=[])

    def hold(tensors, path, metadata):
        if "step_00000003" in str(path):
            found.writing.set()
            assert found.go.wait(PATIENCE), "the loop waits for the write"
            found.writing.clear()
        save_file(tensors, path, metadata)

    def note(done):
        if done > 3 and not found.go.is_set():
            assert found.writing.wait(PATIENCE)
            found.steps.append(done)

    monkeypatch.setattr(checkpoint, "save_file", hold)
    after_each_step(monkeypatch, note)
    return found


def test_the_loop_goes_on_and_the_file_has_the_values_of_its_step(image_folder, tmp_path, held, monkeypatch):
    whole, resumed, plain = (tmp_path / name for name in ("whole", "resumed", "plain"))
    after_each_step(monkeypatch, lambda done: held.go.set() if done == 5 else None)
    flags = "--encoder-momentum 0.9 --drop 0.1 --keep 3".split()
    assert train_few(image_folder, whole, *flags) == 0
    assert held.steps == [4, 5]
    monkeypatch.undo()
    assert train_few(image_folder, plain, *flags) == 0
    third = "checkpoints/step_00000003.safetensors"
    assert_same_weights(whole / third, plain / third)
    assert_same_weights(whole, plain)
    assert train_few(image_folder, resumed, *flags, "--resume", whole / third) == 0
    assert_same_weights(resumed, plain)


def test_a_failed_write_ends_the_run_with_one_line_and_leaves_the_checkpoint_before(
    image_folder, tmp_path, monkeypatch, capsys
):
    save_file, run = checkpoint.save_file, tmp_path / "run"
    failed, threads = threading.Event(), []

    def full(tensors, path, metadata):
        threads.append(threading.current_thread().name)
        if "step_00000004" in str(path):
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    last = []
    after_each_step(monkeypatch, lambda done: (last.append(done), done == 5 and failed.wait(PATIENCE)))
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert train_few(image_folder, run, "--save-freq", "2") == 2
    error = last_line(capsys)
    for words in ("step_00000004.safetensors: cannot be written", "No space left", "--output-dir", "--resume"):
        assert words in error
    assert set(threads) == {"fastirt-checkpoint"}
    assert 5 <= last[-1] <= 6
    assert not (run / "model.safetensors").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002.safetensors"]
    monkeypatch.undo()
    assert train_few(image_folder, run, "--resume") == 0
    assert train_few(image_folder, tmp_path / "plain") == 0
    assert_same_weights(run, tmp_path / "plain")


def test_without_its_last_checkpoint_a_run_leaves_no_model(image_folder, tmp_path, monkeypatch, capsys):
    def full(tensors, path, metadata):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert train_few(image_folder, tmp_path / "run", "--save-freq", "0") == 2
    assert "step_00000006.safetensors: cannot be written" in last_line(capsys)
    assert not (tmp_path / "run/model.safetensors").exists()


def test_an_error_of_the_loop_lets_the_write_end(image_folder, tmp_path, held, monkeypatch, capsys):
    row, run = RunLog.row, tmp_path / "run"

    def full(self, values):
        if values["step"] == 4:
            threading.Timer(0.5, held.go.set).start()
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        row(self, values)

    monkeypatch.setattr(RunLog, "row", full)
    assert train_few(image_folder, run) == 2
    assert "log.jsonl: No space left on device" in last_line(capsys)
    assert checkpoint.load(run / "checkpoints/step_00000003.safetensors")["step"] == 3
    assert not list((run / "checkpoints").glob(".*"))


def test_an_evaluation_comes_after_the_checkpoint_of_its_step(image_folder, tmp_path, held, monkeypatch):
    evaluate, run, found = fastirt.commands.evaluate, tmp_path / "run", []

    def measure(*given, **options):
        found.append(saved_steps(run))
        return evaluate(*given, **options)

    monkeypatch.setattr(fastirt.commands, "evaluate", measure)
    after_each_step(monkeypatch, lambda done: done == 3 and threading.Timer(0.5, held.go.set).start())
    assert train_few(image_folder, run, "--eval-freq", "3") == 0
    assert found == [[3], [3, 6]]


def test_a_stop_waits_for_the_write_and_leaves_its_own_checkpoint(image_folder, tmp_path, held, monkeypatch, caplog):
    def stop(done):
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.3, held.go.set).start()

    after_each_step(monkeypatch, stop)
    assert train_few(image_folder, tmp_path / "run") == 143
    assert "step_00000004.safetensors" in caplog.text
    assert saved_steps(tmp_path / "run") == [3, 4]
    assert [row["step"] for row in loss_rows(tmp_path / "run")] == [2, 4]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--save-seconds 25", [3, 6, 8]),
        ("--save-seconds 25 --save-freq 2", [2, 4, 6, 8]),  # never 25 seconds without one
        ("--save-seconds 25 --save-freq 4", [3, 4, 7, 8]),
        ("--save-freq 3", [3, 6, 8]),
        ("--save-freq 0", [8]),
        ("", [8]),  # in less than 5 minutes
    ],
)
def test_saves_by_time_and_by_steps(image_folder, tmp_path, monkeypatch, flags, expected):
    """Each step takes ten seconds."""
    clock = [0.0]
    after_each_step(monkeypatch, lambda done: clock.__setitem__(0, 10.0 * done))
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    steps = "--max-iter 8 --batch-size 8 --rank 1 --keep 9"
    assert train_tiny(image_folder, tmp_path / "run", *steps.split(), *flags.split()) == 0
    assert saved_steps(tmp_path / "run") == expected


def test_a_snapshot_shares_nothing_with_the_state():
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a": [shared.T, (shared, 3)], "b": None, "c": torch.tensor(2), "d": {0: "text"}}
    snapshot = Snapshot()
    copied = snapshot.take(state)
    assert not snapshot.in_flight
    expected = shared.clone()
    shared.zero_()
    assert same_bits(copied["a"][0], expected.T) and copied["a"][0].is_contiguous()
    assert same_bits(copied["a"][1][0], expected) and copied["a"][1][1] == 3
    assert copied["b"] is None and copied["d"] == {0: "text"} and isinstance(copied["a"][1], tuple)


@needs_gpu
def test_a_snapshot_of_a_gpu_has_the_values_of_its_moment():
    weights = torch.zeros(2**26, device="cuda")
    convolution = torch.randn(64, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    expected, snapshot = convolution.cpu().contiguous(), Snapshot()
    places = set()
    for number in range(3):
        copied = snapshot.take({"weights": weights, "convolution": convolution})
        weights.add_(1)
        assert snapshot.in_flight
        snapshot.wait()
        assert torch.equal(copied["weights"], torch.full((2**26,), float(number)))
        assert same_bits(copied["convolution"], expected) and copied["convolution"].is_pinned()
        places.add(copied["weights"].data_ptr())
    assert len(places) == 1


def test_what_cannot_be_written_is_named_by_the_thread(image_folder, tmp_path, monkeypatch, capsys):
    """An optimizer whose state a checkpoint cannot hold."""
    monkeypatch.setattr(
        "fastirt.training.training_state.optimizer_state", lambda optimizer: {"state": {0: {"hook": lambda: None}}}
    )
    assert train_few(image_folder, tmp_path / "run") == 2
    assert "optimizer.state.0.hook, a function: choose another --opt" in last_line(capsys)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "run/checkpoints/step_00000003.safetensors")
