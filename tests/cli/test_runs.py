"""A run from outside: evaluated from anywhere, on other images, after a failed start, without a test split."""

import json
import os
import shutil

import pytest

from fastirt.cli import main
from fastirt.training.run_log import RunLog
from tests.helpers import TINY, write_images

SHORT = "--max-iter 4 --batch-size 8 --logging-freq 1 --rank 1 2".split()


def train(data, out, *flags):
    own = ["--dataset", "folder", "--data-path", str(data), "--output-dir", str(out), "--method", "irt-l"]
    return main(["train", *own, *TINY, *SHORT, *flags])


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "a/data", 10, 4)
    return tmp_path / "a/data"


def test_a_run_is_evaluated_on_its_own_images_from_any_folder(data, tmp_path, monkeypatch):
    """A relative --data-path and another data set of the same relative name in the folder of the evaluation."""
    monkeypatch.chdir(tmp_path / "a")
    assert train("data", "run", "--log-dir", "logs") == 0
    config = json.loads((tmp_path / "a/run/config.json").read_text())["config"]
    assert config["data"]["data_path"] == str(data) and config["run"]["output_dir"] == str(tmp_path / "a/run")
    assert config["run"]["log_dir"] == str(tmp_path / "a/logs")
    before = metrics(tmp_path / "a/run")
    write_images(tmp_path / "b/data", 12, 5, seed=1)
    monkeypatch.chdir(tmp_path / "b")
    assert main(["evaluate", "../a/run", "--device", "cpu"]) == 0
    assert metrics(tmp_path / "a/run") == before and os.listdir(tmp_path / "b") == ["data"]


def test_other_images_are_named_and_leave_the_runs_metrics_alone(data, tmp_path, caplog, monkeypatch):
    assert train(data, tmp_path / "run") == 0
    before = (tmp_path / "run/metrics.json").read_bytes()
    write_images(tmp_path / "other", 12, 5, seed=1)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(tmp_path / "run"), "--data-path", str(tmp_path / "other")]) == 0
    assert "not the images that the run was evaluated on" in caplog.text
    assert metrics(tmp_path / "outputs/folder/irt-l-vit_tiny_patch16_224-1")["queries"] == 30
    write_images(data / "class99", 1, 1)  # the run's own folder has changed since
    caplog.clear()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "not the images" in caplog.text and (tmp_path / "run/metrics.json").read_bytes() == before


def test_runs_of_earlier_versions_are_known_by_their_checkpoint(data, tmp_path, caplog):
    """config.json had no digests; a checkpoint always had one."""
    assert train(data, tmp_path / "run") == 0
    path = tmp_path / "run/config.json"
    tree = json.loads(path.read_text())
    del tree["images"]
    path.write_text(json.dumps(tree))
    (tmp_path / "run/metrics.json").unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run")["queries"] == 20 and "not the images" not in caplog.text


@pytest.mark.parametrize("start", ["weights", "cache", "first image", "rank", "evaluate"])
def test_a_start_that_fails_leaves_no_folder(data, tmp_path, start, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"no weights at all")
    own = ["--dataset", "folder", "--data-path", str(data), "--method", "irt-l", *TINY, *SHORT]
    if start == "weights":
        code = main(["train", *own, "--weights", str(tmp_path / "broken.safetensors")])
    elif start == "evaluate":
        code = main(["evaluate", *own, "--weights", str(tmp_path / "broken.safetensors")])
    elif start == "cache":
        code = main(["train", *own, "--resize-size", "60000", "--cache", "host"])
    elif start == "rank":
        code = main(["train", *own, "--rank", "500"])
    else:
        for image in data.glob("*/*"):
            image.write_bytes(b"no image at all")
        code = main(["train", *own, "--max-bad", "500"])
    assert code == 2 and "error" in capsys.readouterr().err
    if start == "first image":
        assert list(tmp_path.glob("outputs/*/*/bad_pictures.csv"))  # the message sends the reader there
    else:
        assert not (tmp_path / "outputs").exists()


def test_a_folder_of_somebodys_own_survives_a_start_that_fails(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert train(data, tmp_path / "mine", "--weights", str(tmp_path / "none.pth")) == 2
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_without_a_test_split_all_of_it_trains_and_nothing_is_evaluated(data, tmp_path, caplog):
    root = tmp_path / "set"
    shutil.copytree(data, root / "train")
    assert train(root, tmp_path / "run", "--eval-freq", "2") == 0
    assert (tmp_path / "run/model.safetensors").exists() and not (tmp_path / "run/metrics.json").exists()
    assert "40 train images" in caplog.text
    assert main(["evaluate", str(tmp_path / "run")]) == 2


def test_an_evaluation_needs_no_training_split(data, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(data, root / "test")
    own = ["--dataset", "folder", "--data-path", str(root), *TINY, "--output-dir", str(tmp_path / "o")]
    assert main(["evaluate", *own]) == 0 and metrics(tmp_path / "o")["queries"] == 40


def test_k_above_what_is_left_after_unreadable_images(data, tmp_path, caplog):
    """The other metrics and a warning: of an evaluation, at the end of training, and when a run is resumed."""
    (data / "class05/0.jpg").write_bytes(b"")
    own = ["--dataset", "folder", "--data-path", str(data), *TINY]
    assert main(["evaluate", *own, "--rank", "19", "--output-dir", str(tmp_path / "o")]) == 0
    assert set(metrics(tmp_path / "o")) == {"map@r", "r_precision", "queries", "gallery", "unmatched", "bad"}
    assert "left out Recall@K for K above 18" in caplog.text
    assert train(data, tmp_path / "run", "--rank", "19", "19", "--eval-freq", "2") == 0
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "map@r" in metrics(tmp_path / "run")
    assert train(data, tmp_path / "two", "--rank", "2", "19") == 0 and "recall@2" in metrics(tmp_path / "two")


@pytest.mark.parametrize("step", [0, 2])
def test_tensorboard_that_cannot_be_written_never_ends_training(data, tmp_path, step, monkeypatch, caplog, capfd):
    """Its folder goes away, and where it stood a file stands: the rest of the run is as if nothing had happened."""
    logs, row = tmp_path / "logs", RunLog.row

    def vanish(self, values):
        if values["step"] == step + 1 and logs.is_dir():
            shutil.rmtree(logs)
            logs.write_text("")
        row(self, values)

    monkeypatch.setattr(RunLog, "row", vanish)
    assert train(data, tmp_path / "run", "--log-dir", str(logs)) == 0
    assert caplog.text.count("TensorBoard logs cannot be written") == 1
    assert "Traceback" not in capfd.readouterr().err
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]
    logs.unlink()
    logs.write_text("")
    caplog.clear()
    assert main(["train", "--resume", str(tmp_path / "run"), "--max-iter", "6"]) == 0
    assert caplog.text.count("TensorBoard logs cannot be written") == 1


def test_training_goes_on_from_a_model_file_of_its_own_architecture(data, tmp_path):
    assert train(data, tmp_path / "run", "--pooling", "mean") == 0
    own = ["--dataset", "folder", "--data-path", str(data), "--device", "cpu", "--method", "irt-r", *SHORT]
    for weights, out in (("run/model.safetensors", "two"), ("run", "three")):
        more = ["--weights", str(tmp_path / weights), "--output-dir", str(tmp_path / out), "--resize-size", "18"]
        assert main(["train", *own, *more]) == 0
        config = json.loads((tmp_path / out / "config.json").read_text())["config"]
        assert config["model"]["model"] == "vit_tiny_patch16_224" and config["model"]["pooling"] == "mean"
        assert config["input"]["input_size"] == 16 and config["method"] == "irt-r"


def test_the_first_line_says_the_recipe(data, tmp_path, caplog):
    own = ["--dataset", "folder", "--data-path", str(data)]
    assert (
        main(["pack", str(tmp_path / "store"), *own, "--method", "irt-r", "--input-size", "16", "--workers", "1"]) == 0
    )
    assert caplog.messages[0].startswith("pack: recipe paper: resize to 18 x 18, crop 16 x 16")
    caplog.clear()
    small = [word for word in TINY if word not in ("--resize-size", "18")]
    packed = ["--packed", str(tmp_path / "store"), "--output-dir", str(tmp_path / "run")]
    assert main(["train", *own, *small, *SHORT, *packed, "--method", "irt-l"]) == 0
    assert caplog.messages[0].startswith("train: irt-l, recipe paper: resize to 18 x 18, crop 16 x 16")
    caplog.clear()
    assert main(["evaluate", *own, *small, *packed[:2], "--output-dir", str(tmp_path / "e")]) == 0
    assert caplog.messages[0].startswith("evaluate: irt-o, recipe paper: resize to 18 x 18")
    caplog.clear()
    assert main(["train", *own, *small, *SHORT, "--output-dir", str(tmp_path / "public")]) == 0
    assert caplog.messages[0].startswith("train: irt-r, recipe unofficial: resize to shorter side 18")


def test_a_packed_store_says_how_its_images_were_resized(data, tmp_path, caplog):
    """Packed with another resize than the recipe's: the store's counts, and that is said; a named recipe is refused."""
    own = ["--dataset", "folder", "--data-path", str(data), *TINY, "--rank", "1"]
    store = str(tmp_path / "s.pack")
    assert main(["pack", store, *own[:4], "--resize", "shorter", "--resize-size", "18", "--input-size", "16"]) == 0
    assert main(["evaluate", *own, "--packed", store, "--output-dir", str(tmp_path / "packed")]) == 0
    assert "was packed with --resize shorter: taken" in caplog.text and "resize to shorter side 18" in caplog.text
    assert main(["evaluate", *own, "--resize", "shorter", "--output-dir", str(tmp_path / "files")]) == 0
    ours, theirs = (metrics(tmp_path / name) for name in ("packed", "files"))
    assert ours["recall@1"] == pytest.approx(theirs["recall@1"], abs=0.1)  # a JPEG of the resized image in between
    assert main(["evaluate", *own, "--packed", store, "--recipe", "paper"]) == 2


def test_images_that_were_replaced_under_their_names_are_other_images(data, tmp_path, caplog, monkeypatch):
    assert train(data, tmp_path / "run") == 0
    before = (tmp_path / "run/metrics.json").read_bytes()
    write_images(tmp_path / "new", 10, 4, seed=9)
    shutil.rmtree(data)
    shutil.move(tmp_path / "new", data)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "not the images" in caplog.text and (tmp_path / "run/metrics.json").read_bytes() == before


def test_a_presets_k_that_the_gallery_cannot_hold_is_left_out(tmp_path, caplog, capsys):
    """One that the user asks for is refused."""
    write_images(tmp_path / "small", 4, 3)  # two classes to evaluate on
    own = ["evaluate", "--dataset", "folder", "--data-path", str(tmp_path / "small"), *TINY]
    own += ["--output-dir", str(tmp_path / "out")]
    assert main([*own, "--rank", "8"]) == 2 and "--rank 8" in capsys.readouterr().err
    assert main(own) == 0
    assert "left out Recall@K for K above 5" in caplog.text
    assert [name for name in metrics(tmp_path / "out") if "recall" in name] == ["recall@1", "recall@2", "recall@4"]


def test_words_for_weights_are_no_files(data, tmp_path, monkeypatch, capsys):
    """`scratch` where something is called so, `none`, and a home folder that the shell left alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    assert train(data, "run", "--orientation", "stored") == 0
    own = ["--dataset", "folder", "--data-path", str(data), "--device", "cpu", "--rank", "1", "2"]
    assert main(["evaluate", *own, "--weights", "none", "--model", "vit_tiny_patch16_224"]) == 2
    assert "could not be downloaded" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["evaluate", *own, "--weights=~/run/model.safetensors", "--output-dir", "file"]) == 0
    config = json.loads((tmp_path / "file/config.json").read_text())["config"]
    assert config["input"]["input_size"] == 16 and config["input"]["orientation"] == "stored"
    assert metrics(tmp_path / "file") == metrics(tmp_path / "run")


def test_a_packed_store_of_another_size_is_refused_where_the_crop_is_given(data, tmp_path):
    own = ["--dataset", "folder", "--data-path", str(data)]
    assert main(["pack", str(tmp_path / "s.pack"), *own]) == 0  # 256 x 256
    sizes = [*TINY[: TINY.index("--resize-size")], *TINY[TINY.index("--resize-size") + 2 :]]
    assert main(["evaluate", *own, *sizes, "--rank", "1", "--packed", str(tmp_path / "s.pack")]) == 2


def test_a_checkpoint_is_evaluated_as_its_run_was(data, tmp_path, capsys):
    flags = ["--pooling", "mean", "--orientation", "stored", "--resize", "shorter", "--save-freq", "4"]
    assert train(data, tmp_path / "run", *flags) == 0
    file = tmp_path / "run/checkpoints/step_00000004.safetensors"
    assert file.exists(), list(file.parent.iterdir())
    own = ["--dataset", "folder", "--data-path", str(data), "--device", "cpu", "--rank", "1", "2"]
    assert main(["evaluate", str(file), *own, "--output-dir", str(tmp_path / "out")]) == 0
    assert metrics(tmp_path / "out") == metrics(tmp_path / "run")
    assert main(["evaluate", str(file), *own, "--weights", str(file)]) == 2
    assert "two models" in capsys.readouterr().err


def test_an_evaluation_is_of_the_runs_own_method_and_names_flags_that_change_nothing(data, tmp_path, caplog, capsys):
    assert train(data, tmp_path / "run") == 0
    assert main(["evaluate", str(tmp_path / "run"), "--method", "irt-r"]) == 2
    assert "irt-l" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--lr", "2", "--output-dir", str(tmp_path / "out")]) == 0
    assert "--lr: for training alone" in caplog.text


def test_a_run_without_metrics_has_a_row(data, tmp_path, capsys):
    assert train(data, tmp_path / "run") == 0
    shutil.copytree(tmp_path / "run", tmp_path / "unfinished")
    (tmp_path / "unfinished/metrics.json").unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "unfinished")]) == 0
    assert "| unfinished |" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 2
