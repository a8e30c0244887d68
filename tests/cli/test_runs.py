"""Starts that fail, data without a test split, weights of another run, packed stores."""

import shutil

import pytest

from fastirt.training.run_log import RunLog
from tests.helpers import (
    SHORT,
    TINY,
    TINY_MODEL,
    folder_flags,
    read_config,
    read_log,
    read_metrics,
    run_cli,
    train_short,
    write_images,
)

# TINY without it
NO_RESIZE = TINY[: TINY.index("--resize-size")] + TINY[TINY.index("--resize-size") + 2 :]


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "data", 10, 4)
    return tmp_path / "data"


FAILING_STARTS = {
    "weights": ("train", "--weights broken.safetensors"),
    "evaluate": ("evaluate", "--weights broken.safetensors"),
    "cache": ("train", "--resize-size 60000 --cache host"),
    "rank": ("train", "--rank 500"),
    "first image": ("train", "--max-bad 500"),
}


@pytest.mark.parametrize("start", FAILING_STARTS)
def test_a_start_that_fails_leaves_no_folder(data, tmp_path, start, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"no weights at all")
    if start == "first image":
        for image in data.glob("*/*"):
            image.write_bytes(b"no image at all")
    command, flags = FAILING_STARTS[start]
    assert run_cli(command, *folder_flags(data), "--method", "irt-l", *TINY, *SHORT, *flags.split()) == 2
    assert "error" in capsys.readouterr().err
    if start == "first image":
        # the message sends the reader there
        assert list(tmp_path.glob("outputs/*/*/bad_pictures.csv"))
    else:
        assert not (tmp_path / "outputs").exists()


def test_a_folder_of_somebodys_own_survives_a_start_that_fails(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert train_short(data, tmp_path / "mine", "--weights", tmp_path / "none.pth") == 2
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_without_a_test_split_all_of_it_trains_and_nothing_is_evaluated(data, tmp_path, caplog):
    root, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(data, root / "train")
    assert train_short(root, run, "--eval-freq", "2") == 0
    assert (run / "model.safetensors").exists()
    assert not (run / "metrics.json").exists()
    assert "40 train images" in caplog.text
    assert run_cli("evaluate", run) == 2


@pytest.mark.parametrize("step", [0, 2])
def test_tensorboard_that_cannot_be_written_never_ends_training(data, tmp_path, step, monkeypatch, caplog, capfd):
    """Its folder goes away, and where it stood a file stands: the rest of the run is as if nothing
    had happened."""
    logs, row = tmp_path / "logs", RunLog.row

    def vanish(self, values):
        if values["step"] == step + 1 and logs.is_dir():
            shutil.rmtree(logs)
            logs.write_text("")
        row(self, values)

    monkeypatch.setattr(RunLog, "row", vanish)
    assert train_short(data, tmp_path / "run", "--log-dir", logs) == 0
    assert caplog.text.count("TensorBoard logs cannot be written") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2, 3, 4, 4]
    logs.unlink()
    logs.write_text("")
    caplog.clear()
    assert run_cli("train", "--resume", tmp_path / "run", "--max-iter", "6") == 0
    assert caplog.text.count("TensorBoard logs cannot be written") == 1


def test_training_goes_on_from_a_model_file_of_its_own_architecture(data, tmp_path):
    assert train_short(data, tmp_path / "run", "--pooling", "mean") == 0
    flags = [*folder_flags(data), *"--device cpu --method irt-r --resize-size 18".split(), *SHORT]
    for weights, out in (("run/model.safetensors", "two"), ("run", "three")):
        assert run_cli("train", *flags, "--weights", tmp_path / weights, "--output-dir", tmp_path / out) == 0
        config = read_config(tmp_path / out)
        assert config["method"] == "irt-r"
        assert (config["model"]["model"], config["model"]["pooling"]) == (TINY_MODEL, "mean")
        assert config["input"]["input_size"] == 16


def test_the_first_line_says_the_recipe(data, tmp_path, caplog):
    store = tmp_path / "store"
    pack = ["pack", store, *"--method irt-r --input-size 16 --workers 1".split()]
    train = ["train", *NO_RESIZE, *SHORT]
    commands = [
        (pack, "pack: recipe paper: resize to 18 x 18, crop 16 x 16"),
        (
            [*train, "--packed", store, "--method", "irt-l", "--output-dir", tmp_path / "run"],
            "train: irt-l, recipe paper: resize to 18 x 18, crop 16 x 16",
        ),
        (
            ["evaluate", *NO_RESIZE, "--packed", store, "--output-dir", tmp_path / "e"],
            "evaluate: irt-o, recipe paper: resize to 18 x 18",
        ),
        ([*train, "--output-dir", tmp_path / "public"], "train: irt-r, recipe unofficial: resize to shorter side 18"),
    ]
    for words, first in commands:
        caplog.clear()
        assert run_cli(*words, *folder_flags(data)) == 0
        assert caplog.messages[0].startswith(first)


def test_a_packed_store_says_how_its_images_were_resized(data, tmp_path, caplog):
    """Packed with another resize than the recipe's: the store's counts, with a warning; a named
    recipe is refused."""
    store, packed, files = (tmp_path / name for name in ("s.pack", "packed", "files"))
    shorter = "--resize shorter --resize-size 18 --input-size 16".split()
    assert run_cli("pack", store, *folder_flags(data), *shorter) == 0
    words = ["evaluate", *folder_flags(data), *TINY, "--rank", "1"]
    assert run_cli(*words, "--packed", store, "--output-dir", packed) == 0
    assert "packed with --resize shorter" in caplog.text
    assert "resize to shorter side 18" in caplog.text
    assert run_cli(*words, "--resize", "shorter", "--output-dir", files) == 0
    recalls = [read_metrics(out)["recall@1"] for out in (packed, files)]
    # a JPEG of the resized image in between
    assert recalls[0] == pytest.approx(recalls[1], abs=0.1)
    assert run_cli(*words, "--packed", store, "--recipe", "paper") == 2


def test_a_packed_store_of_another_size_is_refused_where_the_crop_is_given(data, tmp_path):
    assert run_cli("pack", tmp_path / "s.pack", *folder_flags(data)) == 0  # 256 x 256
    words = ["evaluate", *folder_flags(data), *NO_RESIZE, "--rank", "1"]
    assert run_cli(*words, "--packed", tmp_path / "s.pack") == 2
