"""`fastirt evaluate` of runs, model files and checkpoints; `fastirt report`."""

import csv
import json
import os
import shutil

import pytest

from tests.helpers import (
    TINY,
    TINY_MODEL,
    folder_flags,
    last_line,
    read_config,
    read_metrics,
    run_cli,
    train_short,
    write_images,
)


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "a/data", 10, 4)
    return tmp_path / "a/data"


def test_a_run_is_evaluated_on_its_own_images_from_any_folder(data, tmp_path, monkeypatch):
    """A relative --data-path and another data set of the same relative name in the folder of the
    evaluation."""
    monkeypatch.chdir(tmp_path / "a")
    assert train_short("data", "run", "--log-dir", "logs") == 0
    config = read_config(tmp_path / "a/run")
    assert config["data"]["data_path"] == str(data)
    assert config["run"]["output_dir"] == str(tmp_path / "a/run")
    assert config["run"]["log_dir"] == str(tmp_path / "a/logs")
    before = read_metrics(tmp_path / "a/run")
    write_images(tmp_path / "b/data", 12, 5, seed=1)
    monkeypatch.chdir(tmp_path / "b")
    assert run_cli("evaluate", "../a/run", "--device", "cpu") == 0
    assert read_metrics(tmp_path / "a/run") == before
    assert os.listdir(tmp_path / "b") == ["data"]


def test_other_images_are_named_and_leave_the_runs_metrics_alone(data, tmp_path, caplog, monkeypatch):
    assert train_short(data, tmp_path / "run") == 0
    before = (tmp_path / "run/metrics.json").read_bytes()
    write_images(tmp_path / "other", 12, 5, seed=1)
    monkeypatch.chdir(tmp_path)
    assert run_cli("evaluate", "run", "--data-path", "other") == 0
    assert "not the images" in caplog.text
    assert read_metrics(tmp_path / f"outputs/folder/irt-l-{TINY_MODEL}-1")["queries"] == 30
    write_images(data / "class99", 1, 1)  # the run's own folder has changed since
    caplog.clear()
    assert run_cli("evaluate", "run") == 0
    assert "not the images" in caplog.text
    assert (tmp_path / "run/metrics.json").read_bytes() == before


def test_images_that_were_replaced_under_their_names_are_other_images(data, tmp_path, caplog, monkeypatch):
    assert train_short(data, tmp_path / "run") == 0
    before = (tmp_path / "run/metrics.json").read_bytes()
    write_images(tmp_path / "new", 10, 4, seed=9)
    shutil.rmtree(data)
    shutil.move(tmp_path / "new", data)
    monkeypatch.chdir(tmp_path)
    assert run_cli("evaluate", "run") == 0
    assert "not the images" in caplog.text
    assert (tmp_path / "run/metrics.json").read_bytes() == before


def test_evaluation_with_other_flags_leaves_the_runs_own_figures_alone(trained_run, tmp_path, capsys, monkeypatch):
    before = (trained_run / "metrics.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert run_cli("evaluate", trained_run, "--rank", "3") == 0
    assert (trained_run / "metrics.json").read_bytes() == before
    assert "recall@3" in read_metrics(tmp_path / f"outputs/folder/irt-r-{TINY_MODEL}-1")
    assert run_cli("evaluate", trained_run) == 0
    assert read_metrics(trained_run) == json.loads(before)
    assert "map" in read_metrics(trained_run)  # which needs all ranks: a search keeps it
    assert run_cli("evaluate", trained_run, "--search", "torch") == 0
    assert read_metrics(trained_run) == json.loads(before)
    assert run_cli("evaluate", tmp_path / "typo") == 2
    assert "no such run folder" in last_line(capsys)


def test_runs_of_earlier_versions_are_known_by_their_checkpoint(trained_run, caplog):
    """config.json had no digests; a checkpoint always had one."""
    path = trained_run / "config.json"
    tree = json.loads(path.read_text())
    del tree["images"]
    path.write_text(json.dumps(tree))
    (trained_run / "metrics.json").unlink()
    assert run_cli("evaluate", trained_run) == 0
    assert read_metrics(trained_run)["queries"] == 24
    assert "not the images" not in caplog.text


def test_an_evaluation_needs_no_training_split(data, tmp_path):
    root, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(data, root / "test")
    assert run_cli("evaluate", *folder_flags(root), *TINY, "--output-dir", out) == 0
    assert read_metrics(out)["queries"] == 40


def test_k_above_what_is_left_after_unreadable_images(data, tmp_path, caplog):
    """The other metrics and a warning: of an evaluation, at the end of training, and when a run is
    resumed."""
    (data / "class05/0.jpg").write_bytes(b"")
    out, run, two = (tmp_path / name for name in ("out", "run", "two"))
    assert run_cli("evaluate", *folder_flags(data), *TINY, "--rank", "19", "--output-dir", out) == 0
    metrics = read_metrics(out)
    assert list(metrics)[0] == "map@r" and {"r_precision", "queries", "gallery", "unmatched", "bad"} < set(metrics)
    assert not [name for name in metrics if name.endswith(("@1", "@19"))]
    assert "K above 18" in caplog.text
    assert train_short(data, run, *"--rank 19 19 --eval-freq 2".split()) == 0
    assert run_cli("train", "--resume", run) == 0
    assert "map@r" in read_metrics(run)
    assert train_short(data, two, "--rank", "2", "19") == 0
    assert "recall@2" in read_metrics(two)


def test_a_presets_k_that_the_gallery_cannot_hold_is_left_out(tmp_path, caplog, capsys):
    """A K that the user asks for is refused."""
    write_images(tmp_path / "small", 4, 3)  # two classes to evaluate on
    words = ["evaluate", *folder_flags(tmp_path / "small"), *TINY, "--output-dir", tmp_path / "out"]
    assert run_cli(*words, "--rank", "8") == 2
    assert "--rank 8" in last_line(capsys)
    assert run_cli(*words) == 0
    assert "K above 5" in caplog.text
    metrics = read_metrics(tmp_path / "out")
    assert [name for name in metrics if name.startswith("recall@")] == ["recall@1", "recall@2", "recall@4"]


def test_words_for_weights_are_no_files(data, tmp_path, monkeypatch, capsys):
    """`scratch` where something is called so, `none`, and a home folder that the shell left
    alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    assert train_short(data, "run", "--orientation", "stored") == 0
    flags = [*folder_flags(data), *"--device cpu --rank 1 2".split()]
    assert run_cli("evaluate", *flags, "--weights", "none", "--model", TINY_MODEL) == 2
    assert "could not be downloaded" in last_line(capsys)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_cli("evaluate", *flags, "--weights=~/run/model.safetensors", "--output-dir", "file") == 0
    config = read_config(tmp_path / "file")["input"]
    assert (config["input_size"], config["orientation"]) == (16, "stored")
    assert read_metrics(tmp_path / "file") == read_metrics(tmp_path / "run")


def test_a_checkpoint_is_evaluated_as_its_run_was(data, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert train_short(data, run, *"--pooling mean --orientation stored --resize shorter --save-freq 4".split()) == 0
    file = run / "checkpoints/step_00000004.safetensors"
    assert file.exists(), list(file.parent.iterdir())
    words = ["evaluate", file, *folder_flags(data), *"--device cpu --rank 1 2".split()]
    assert run_cli(*words, "--output-dir", out) == 0
    assert read_metrics(out) == read_metrics(run)
    assert run_cli(*words, "--weights", file) == 2
    assert "two models" in last_line(capsys)


def test_an_evaluation_is_of_the_runs_own_method_and_names_flags_that_change_nothing(
    trained_run, tmp_path, caplog, capsys
):
    assert run_cli("evaluate", trained_run, "--method", "irt-l") == 2
    assert "irt-r" in last_line(capsys)
    assert run_cli("evaluate", trained_run, "--lr", "2", "--output-dir", tmp_path / "out") == 0
    assert "--lr: for training alone" in caplog.text


def test_a_run_without_metrics_has_a_row(trained_run, tmp_path, capsys):
    unfinished = shutil.copytree(trained_run, tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    capsys.readouterr()
    assert run_cli("report", trained_run, unfinished) == 0
    assert "| unfinished |" in capsys.readouterr().out
    assert run_cli("report", tmp_path) == 2


def test_a_row_for_each_query(trained_run, tmp_path, capsys, caplog):
    """Of a run, whose own metrics stay; and of an evaluation at the end of training."""
    before = (trained_run / "metrics.json").read_bytes()
    capsys.readouterr()
    assert run_cli("evaluate", trained_run, "--per-query", tmp_path / "rows.csv") == 0
    assert (trained_run / "metrics.json").read_bytes() == before
    metrics, printed = read_metrics(trained_run), capsys.readouterr().out
    low, high = (f"{100 * metrics[f'ci95_{end}_recall@1']:.2f}" for end in ("low", "high"))
    assert f"recall@1 {low}-{high}, map@r" in printed and f"median rank {metrics['median_rank']:g}" in printed
    rows = list(csv.DictReader(open(tmp_path / "rows.csv", newline="")))
    assert len(rows) == 24 and sum(row["first_rank"] == "1" for row in rows) == round(24 * metrics["recall@1"])
    assert run_cli("evaluate", trained_run, "--per-query", tmp_path / "rows.xlsx") == 2
    assert "rows.xlsx: end its name in .csv or .parquet" in last_line(capsys)
    assert run_cli("evaluate", trained_run, "--per-query", tmp_path / "no/rows.csv") == 2
    assert "no/rows.csv: cannot be written" in last_line(capsys)


def test_training_writes_the_rows_too_and_refuses_a_bad_name_before_it_starts(data, tmp_path, capsys):
    assert train_short(data, tmp_path / "run", "--per-query", tmp_path / "rows.csv") == 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + read_metrics(tmp_path / "run")["queries"]
    assert train_short(data, tmp_path / "other", "--per-query", tmp_path / "rows.txt") == 2
    assert "--per-query" in last_line(capsys) and not (tmp_path / "other").exists()


def test_means_over_classes_go_to_a_folder_of_their_own(trained_run, tmp_path, capsys):
    before = (trained_run / "metrics.json").read_bytes()
    assert run_cli("evaluate", trained_run, "--average", "class", "--output-dir", tmp_path / "out") == 0
    assert "means over classes" in capsys.readouterr().out
    assert (trained_run / "metrics.json").read_bytes() == before
    assert read_config(tmp_path / "out")["eval"]["average"] == "class"
    assert run_cli("report", trained_run, tmp_path / "out") == 0
    assert "| average |" in capsys.readouterr().out
