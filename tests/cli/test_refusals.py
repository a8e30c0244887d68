"""What `fastirt` refuses about a run, in one line with the flag, the file or the difference."""

import errno
import fcntl

import pytest

from fastirt.distributed.ranks import SINGLE_PROCESS
from fastirt.training import checkpoint
from fastirt.training.run_folder import RunFolder
from tests.helpers import (
    TINY_MODEL,
    folder_flags,
    last_line,
    run_cli,
    train_few,
    write_splits,
)

SHALLOW = "--model-kwargs patch_size=8 embed_dim=48 depth=1 num_heads=3"


@pytest.mark.parametrize(
    "flags, named",
    [
        ("", "already holds a run"),
        ("--resume --lr 0.5", "lr: 0.001, 0.5"),
        (f"--resume {SHALLOW}", "depth=1"),
    ],
)
def test_a_finished_run_is_not_trained_over_nor_resumed_with_other_flags(
    image_folder, trained_run, flags, named, capsys
):
    assert train_few(image_folder, trained_run, *flags.split()) == 2
    assert named in last_line(capsys)


def test_a_damaged_checkpoint_is_not_resumed_from(image_folder, trained_run, capsys):
    path = checkpoint.latest(trained_run)
    path.write_bytes(path.read_bytes()[:-10])
    assert train_few(image_folder, trained_run, "--resume") == 2
    assert "damaged checkpoint" in last_line(capsys)


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--resume /nowhere/nothing", "no checkpoint there"),
        ("--batch-size 96", "larger than the memory"),
        ("--m 3", "--m"),
        ("--opt adahessian", "second derivatives"),
        ("--engine graph", "--engine graph: needs a GPU"),
        ("--opt-betas 0.9", "--opt-betas"),
        ("--opt-betas 0.9 0.99 0.9", "--opt-betas 0.9 0.99 0.9: --opt adamw takes two"),
        ("--log-dir /proc/nope", "--log-dir"),
        ("--rank 1 500", "500"),
    ],
)
def test_flags_that_cannot_work_here_are_named(image_folder, tmp_path, flags, named, capsys):
    assert train_few(image_folder, tmp_path / "run", *flags.split()) == 2
    assert named in last_line(capsys)


def test_an_output_folder_below_a_file_is_refused(image_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train_few(image_folder, tmp_path / "file/run") == 2
    assert "cannot write there" in last_line(capsys)


def test_two_processes_do_not_train_in_one_folder(image_folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run").locked(SINGLE_PROCESS):
        assert train_few(image_folder, tmp_path / "run") == 2
    assert "another process" in last_line(capsys)


def test_a_folder_that_cannot_be_locked_is_refused(image_folder, tmp_path, capsys, monkeypatch):
    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert train_few(image_folder, tmp_path / "run") == 2
    error = last_line(capsys)
    assert "No locks available" in error and "--output-dir" in error


def test_another_data_set_of_the_same_size_is_not_resumed_on(trained_run, tmp_path, capsys):
    data = write_splits(tmp_path / "data", (10, 8), (6, 4))
    (data / "train/class03").rename(data / "train/class03b")
    assert train_few(data, trained_run, "--resume", "--max-iter", "8") == 2
    assert "another data set" in last_line(capsys)


@pytest.mark.parametrize("flag", [(), ("--weights",)])
def test_weights_of_another_model_are_refused(image_folder, trained_run, tmp_path, flag, capsys):
    """Our file names its model: with another --model its depth and width would pass as that
    model's."""
    flags = [*folder_flags(image_folder), *"--model deit_small_patch16_224 --device cpu --output-dir".split()]
    assert run_cli("evaluate", *flag, trained_run / "model.safetensors", *flags, tmp_path / "other") == 2
    error = last_line(capsys)
    assert TINY_MODEL in error
    assert "--model" in error
