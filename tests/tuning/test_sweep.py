"""fastirt sweep: many runs in one process, on classes held out of the training set."""

import csv
import json
import os
import shlex
import signal
import statistics
import sys
from collections import Counter

import numpy as np
import pytest

from fastirt.datasets.records import Split
from fastirt.images.source import FileSource
from fastirt.training.run_log import RunLog
from fastirt.tuning.held_out import split_off
from fastirt.tuning.settings import settings
from fastirt.tuning.sweep_file import read_sweep
from tests.helpers import DECODER, TINY_KWARGS, TINY_MODEL, last_line, read_metrics, run_cli

FILE = f"""
base:
  dataset: folder
  data_path: DATA
  method: irt-r
  model: {TINY_MODEL}
  model-kwargs: [{", ".join(TINY_KWARGS)}]
  weights: scratch
  input: {{input_size: 16, resize_size: 18, num_workers: 2, loader: {DECODER}}}
  device: cpu
  max_iter: 4
  batch_size: 8
  logging_freq: 1
  tracker: none
  eval: {{rank: [1, 2]}}
sweep:
  lr: [1e-3, 1e30, 1e-2]
seeds: [0, 1]
validation: 0.3
"""

opened: list[str] | None = None


def _note(event, arguments):
    if opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)  # cannot be taken away again


def write_sweep(folder, data, text=FILE):
    file = folder / "sweep.yaml"
    file.write_text(text.replace("DATA", str(data)))
    return file


@pytest.fixture(scope="module")
def swept(image_folder, tmp_path_factory):
    """(folder of the results, files that were opened, reads of each image, what was printed)."""
    global opened
    folder, reads, read = tmp_path_factory.mktemp("swept"), Counter(), FileSource.read
    patch = pytest.MonkeyPatch()
    patch.setattr(FileSource, "read", lambda self, row: (reads.update([self.path(row)]), read(self, row))[1])
    printed = []
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    opened = []
    try:
        assert run_cli("sweep", write_sweep(folder, image_folder), "--output-dir", folder / "out") == 0
        return folder / "out", opened, reads, "\n".join(printed)
    finally:
        opened = None
        patch.undo()


def test_no_test_image_is_opened_and_each_other_image_is_decoded_once(swept, image_folder):
    _, files, reads, _ = swept
    assert any(str(image_folder / "train") in file for file in files)
    assert not [file for file in files if str(image_folder / "test") in file]
    assert set(reads.values()) == {1}
    assert len(reads) > 50  # of 80: the validation classes are read whole


def test_settings_are_sorted_by_their_mean_with_the_spread_over_seeds(swept):
    out, *_, printed = swept
    tree = json.loads((out / "sweep.json").read_text())
    assert tree["validation"]["classes"] == {"train": 7, "val": 3}
    *finished, failed = tree["settings"]
    assert [setting["status"] for setting in tree["settings"]] == ["finished", "finished", "failed"]
    assert failed["flags"] == {"lr": 1e30}
    assert "non-finite" in failed["runs"][0]["error"]
    for setting in finished:
        values = [read_metrics(out / run["folder"])["recall@1"] for run in setting["runs"]]
        assert setting["mean"]["recall@1"] == pytest.approx(statistics.fmean(values))
        assert setting["spread"]["recall@1"] == pytest.approx(np.std(values, ddof=1))
        assert [run["seed"] for run in setting["runs"]] == [0, 1]
        assert not (out / setting["runs"][0]["folder"] / "checkpoints").exists()
    assert finished[0]["mean"]["recall@1"] >= finished[1]["mean"]["recall@1"]
    assert tree["best"] == finished[0]["flags"]
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["failed"] * 2
    assert float(rows[0]["recall@1"]) == finished[0]["runs"][0]["metrics"]["recall@1"]
    page = (out / "sweep.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for text in (f"± {100 * finished[0]['spread']['recall@1']:.2f}", "non-finite loss", tree["command"].split()[-1]):
        assert text in printed and text in page, text


def test_the_printed_command_trains_the_best_setting(swept, tmp_path, image_folder):
    command = json.loads((swept[0] / "sweep.json").read_text())["command"]
    assert command in swept[-1]
    words = shlex.split(command)
    assert words[:2] == ["fastirt", "train"]
    assert run_cli(*words[1:], "--output-dir", tmp_path / "run") == 0
    assert read_metrics(tmp_path / "run")["queries"] == 24  # all test images: 6 classes x 4


def test_a_stopped_sweep_goes_on_with_the_runs_that_are_missing(swept, image_folder, tmp_path, monkeypatch, capsys):
    """SIGTERM in the third run, at its second step: the result is that of the undisturbed one."""
    row, rows = RunLog.row, []

    def stop(self, values):
        rows.append(self.path)
        if len(rows) == 5 + 5 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        row(self, values)

    file = write_sweep(tmp_path, image_folder, FILE.replace("1e30, ", ""))
    monkeypatch.setattr(RunLog, "row", stop)
    assert run_cli("sweep", file, "--output-dir", tmp_path / "out") == 143
    waiting = json.loads((tmp_path / "out/sweep.json").read_text())["settings"]
    assert sum(run["status"] == "finished" for setting in waiting for run in setting["runs"]) == 2
    done = set(rows[:10])
    rows.clear()
    assert run_cli("sweep", file, "--output-dir", tmp_path / "out") == 0
    assert len(set(rows)) == 2 and not done & set(rows)
    assert len(rows) == 2 + 1 + 5  # of the stopped run the steps that were missing
    found, expected = (
        {tuple(setting["flags"].values()): setting["mean"] for setting in json.loads(text)["settings"]}
        for text in ((tmp_path / "out/sweep.json").read_text(), (swept[0] / "sweep.json").read_text())
    )
    assert found == {lr: mean for lr, mean in expected.items() if lr != (1e30,)}


def test_a_packed_store_serves_both_parts_of_the_training_set(image_folder, tmp_path):
    store, flags = tmp_path / "store", "--resize-size 18 --input-size 16 --workers 1 --method irt-r"
    assert run_cli("pack", store, "--dataset", "folder", "--data-path", image_folder, *flags.split()) == 0
    text = FILE.replace("dataset: folder", f"dataset: folder\n  packed: {store}").replace("1e30, 1e-2", "")
    file = write_sweep(tmp_path, image_folder, text.replace("[0, 1]", "[0]"))
    assert run_cli("sweep", file, "--output-dir", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/sweep.json").read_text())["best"] == {"lr": 1e-3}


def test_validation_classes_are_a_share_of_the_classes_and_a_function_of_the_seed():
    names = tuple(f"class {i}" for i in range(10))
    train = Split("train", tuple(map(str, range(40))), np.repeat(np.arange(10), 4))
    held = split_off(train, names, 0.3, 0, "here")
    assert held.reshape(10, 4).sum(1).tolist().count(4) == 3 and held.sum() == 12  # whole classes
    assert np.array_equal(held, split_off(train, names, 0.3, 0, "here"))
    others = [split_off(train, names, 0.3, seed, "here") for seed in range(1, 9)]
    assert any(not np.array_equal(held, other) for other in others)
    # the order in which classes are listed does not matter
    turned = Split("train", train.paths[::-1], train.labels[::-1])
    assert np.array_equal(split_off(turned, names, 0.3, 0, "here")[::-1], held)


def test_random_settings_are_of_the_ranges_and_more_runs_keep_the_first(tmp_path):
    text = FILE.replace("lr: [1e-3, 1e30, 1e-2]", "lr: {min: 1e-5, max: 1e-2, log: true}\n  m: {min: 0, max: 2}")
    file = write_sweep(tmp_path, "x", text + "method: random\nruns: 40\n  ")
    drawn = settings(read_sweep(file))
    rates = [setting["lr"] for setting in drawn]
    assert len(drawn) == 40 and min(rates) >= 1e-5 and max(rates) <= 1e-2
    assert {setting["m"] for setting in drawn} == {0, 1, 2}
    assert 0.3 < np.mean(np.array(rates) < 10**-3.5) < 0.7  # half of them: equal chances for equal ratios
    file.write_text(file.read_text().replace("runs: 40", "runs: 7"))
    assert settings(read_sweep(file)) == drawn[:7]


REFUSED = {  # a line of a sweep file to what the error says
    "swep: {lr: [1]}": "swep: no such key; did you mean sweep",
    "lr: 1e-3": "lr: no such key: flags go into base or sweep",
    "sweep: {lr: []}": "sweep.lr: an empty list",
    "sweep: {lr: [1e-3, fast]}": "sweep.lr: value 2: must be a number, not 'fast'",
    "sweep: {learning-rate: [1e-3]}": "sweep.learning-rate: no such option; did you mean lr?",
    "sweep: {lr: {min: 1e-5, max: 1e-3}}": "sweep.lr: min and max need `method: random`",
    "sweep: {lr: [0.1, 1e-1]}": "sweep.lr: 0.1 is listed twice",
    "sweep: {dataset: [folder, csv]}": "sweep.dataset: all runs share it: write it into base",
    "sweep: {seed: [0, 1]}": "sweep.seed: write `seeds: [0, 1, 2]`",
    "sweep: {pooling: [cls, average]}": "sweep.pooling: value 2: 'average' is none of cls, mean",
    "base: {output_dir: x}": "base.output_dir: each run gets its own folder",
    "base: {optim: {momentun: 0.9}}": "base.optim.momentun: no such option; did you mean momentum",
    "method: irt-r": "method: must be grid or random",
    "method: random": "runs: missing",
    "runs: 3": "runs: a grid tries every setting",
    "seeds: 3": "seeds: must be a list such as",
    "validation: 20": "validation: must be the share",
    "metric: recall": "metric: 'recall' is no metric",
    "metric: recall@9": "metric: recall@9 is not measured: base.rank is 1 2",
    "seeds: [0\n": "not YAML",
}


def test_a_malformed_file_is_one_line_that_names_file_and_key(tmp_path, capsys):
    for line, message in REFUSED.items():
        key = line.split(":")[0]
        sections = FILE.strip().split("\n")
        if key in ("base", "sweep"):
            start = sections.index(f"{key}:")
            stop = next(i for i in range(start + 1, len(sections)) if not sections[i].startswith(" "))
            del sections[start:stop]
        else:
            sections = [section for section in sections if not section.startswith(f"{key}:")]
        file = write_sweep(tmp_path, tmp_path, "\n".join([*sections, line]))
        assert run_cli("sweep", file) == 2, line
        error = last_line(capsys)
        assert f"{file}: " in error and message in error, (line, error)
