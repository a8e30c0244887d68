"""fastirt sweep: many runs in one process, on classes held out of the training set."""

import csv
import json
import os
import shlex
import signal
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fastirt.commands import train
from fastirt.datasets import load_dataset
from fastirt.datasets.records import Split
from fastirt.loading.image_cache import ImageCache
from fastirt.loading.image_reader import ImageDecoder
from fastirt.training.run_log import RunLog
from fastirt.tuning import run_sweep
from fastirt.tuning.held_out import split_off
from fastirt.tuning.results import command_line
from fastirt.tuning.settings import settings
from fastirt.tuning.sweep_file import read_sweep
from tests.helpers import DECODER, TINY_KWARGS, TINY_MODEL, last_line, loss_rows, read_metrics, run_cli
from tests.pages.browser import BACKGROUND, OVERFLOW, PHONE, browser, needs_chromium  # noqa: F401

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
def noise(tmp_path_factory):
    """A `folder` data set on which no model is right: 10 classes x 6 images, 4 x 4 to test."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split, classes, views in (("train", 10, 6), ("test", 4, 4)):
        for label in range(classes):
            folder = root / split / f"{split}{label}"
            folder.mkdir(parents=True)
            color = rng.integers(115, 140, 3)
            for view in range(views):
                pixels = np.clip(color + rng.normal(0, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{view}.jpg")
    return root


class Swept(NamedTuple):
    out: Path
    opened: list[str]
    decoded: list[int]  # images by run
    stored: int  # in a cache
    printed: str


@pytest.fixture(scope="module")
def swept(noise, tmp_path_factory):
    """A sweep of three settings with two seeds, watched."""
    global opened
    folder, patch = tmp_path_factory.mktemp("swept"), pytest.MonkeyPatch()
    count, stored, printed, decoded = [0], [0], [], []
    put, decode, whole, start = ImageCache.put, ImageDecoder.decode, ImageDecoder.decode_whole, ImageDecoder.start

    def counted(original, counter, one=False):
        def call(self, *arguments):
            result = original(self, *arguments)
            counter[0] += 0 if result is None and not one else 1 if one else len(arguments[0])
            return result

        return call

    def watched_train(*arguments, **named):
        before = count[0]
        try:
            return train(*arguments, **named)
        finally:
            decoded.append(count[0] - before)

    patch.setattr(ImageCache, "put", counted(put, stored, one=True))
    patch.setattr(ImageDecoder, "decode", counted(decode, count))
    patch.setattr(ImageDecoder, "decode_whole", counted(whole, count))
    patch.setattr(ImageDecoder, "start", counted(start, count))
    patch.setattr(run_sweep, "train", watched_train)
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    opened = []
    try:
        assert run_cli("sweep", write_sweep(folder, noise), "--output-dir", folder / "out") == 0
        return Swept(folder / "out", opened, decoded, stored[0], "\n".join(printed))
    finally:
        opened = None
        patch.undo()


def test_no_test_image_is_opened(swept, noise):
    assert any(str(noise / "train") in file for file in swept.opened)
    assert not [file for file in swept.opened if str(noise / "test") in file]


def test_runs_of_equal_preprocessing_share_their_decoded_images(swept):
    """Both seeds draw images; the other settings draw the same ones again."""
    assert len(swept.decoded) == 6 and swept.decoded[0] > 0
    assert swept.decoded[2:] == [0, 0, 0, 0]
    assert sum(swept.decoded) == swept.stored <= 60


def test_settings_are_sorted_by_their_mean_with_the_spread_over_seeds(swept):
    out, printed = swept.out, swept.printed
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


@needs_chromium
def test_the_page_loads_nothing_and_fits_a_phone_in_dark_mode(swept, browser):  # noqa: F811
    page = swept.out / "sweep.html"
    seen = browser.open(page)
    assert (seen.messages, seen.requests) == ([], [])
    light, rings = (browser.evaluate(script) for script in (BACKGROUND, "document.querySelectorAll('.scale i').length"))
    assert rings == 4 and browser.evaluate("document.querySelectorAll('tr.failed').length") == 1
    seen = browser.open(page, PHONE, "dark")
    assert (seen.messages, seen.requests) == ([], [])
    assert browser.evaluate(OVERFLOW) <= 0 and browser.evaluate(BACKGROUND) != light


def test_a_run_of_a_sweep_is_the_run_on_a_list_with_these_classes_as_test_split(swept, noise, tmp_path):
    tree = json.loads((swept.out / "sweep.json").read_text())
    run = next(run for setting in tree["settings"] for run in setting["runs"] if setting["flags"] == {"lr": 1e-2})
    train_split = load_dataset("folder", str(noise)).train
    names = tuple(f"train{label}" for label in range(10))
    held = split_off(train_split, names, 0.3, 0, "here")
    rows = [
        f"{path},{names[label]},{'test' if out else 'train'}"
        for path, label, out in zip(train_split.paths, train_split.labels, held)
    ]
    (tmp_path / "split.csv").write_text("\n".join(["path,label,split", *rows]))
    data = ("--dataset", "csv", "--data-path", tmp_path / "split.csv", "--output-dir", tmp_path / "run")
    assert run_cli("train", "--config", swept.out / run["folder"] / "run.yaml", *data, "--device", "cpu") == 0
    losses, expected = ([row["loss"] for row in loss_rows(of)] for of in (tmp_path / "run", swept.out / run["folder"]))
    assert losses == expected and len(losses) == 4
    assert read_metrics(tmp_path / "run") == run["metrics"]


def test_the_printed_command_trains_the_best_setting(swept, tmp_path):
    command = json.loads((swept.out / "sweep.json").read_text())["command"]
    assert command in swept.printed
    words = shlex.split(command)
    assert words[:2] == ["fastirt", "train"]
    assert run_cli(*words[1:], "--output-dir", tmp_path / "run") == 0
    assert read_metrics(tmp_path / "run")["queries"] == 16  # all test images: 4 classes x 4


def test_a_stopped_sweep_goes_on_with_the_runs_that_are_missing(swept, noise, tmp_path, monkeypatch):
    """SIGTERM in the second run, at its second step: the result is that of the undisturbed one."""
    row, rows = RunLog.row, []

    def stop(self, values):
        rows.append(self.path)
        if len(rows) == 5 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        row(self, values)

    file = write_sweep(tmp_path, noise, FILE.replace("1e30, ", "").replace("[0, 1]", "[0]"))
    monkeypatch.setattr(RunLog, "row", stop)
    assert run_cli("sweep", file, "--output-dir", tmp_path / "out") == 143
    tree = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [setting["status"] for setting in tree["settings"]] == ["finished", "waiting"]
    rows.clear()
    assert run_cli("sweep", file, "--output-dir", tmp_path / "out") == 0
    assert len(rows) == 2 + 1  # of the stopped run the steps that were missing, and the evaluation
    found, expected = (
        {setting["flags"]["lr"]: setting["runs"][0]["metrics"] for setting in json.loads(file.read_text())["settings"]}
        for file in (tmp_path / "out/sweep.json", swept.out / "sweep.json")
    )
    assert found == {lr: expected[lr] for lr in (1e-3, 1e-2)}


def test_a_packed_store_serves_both_parts_of_the_training_set(noise, tmp_path):
    store, flags = tmp_path / "store", "--resize-size 18 --input-size 16 --workers 1 --method irt-r"
    assert run_cli("pack", store, "--dataset", "folder", "--data-path", noise, *flags.split()) == 0
    text = FILE.replace("dataset: folder", f"dataset: folder\n  packed: {store}").replace("1e30, 1e-2", "")
    file = write_sweep(tmp_path, noise, text.replace("[0, 1]", "[0]"))
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


def test_a_seed_of_the_base_is_the_seed_of_the_runs_unless_both_are_given(tmp_path, capsys):
    text = FILE.replace("seeds: [0, 1]", "").replace("device: cpu", "device: cpu\n  seed: 5")
    sweep = read_sweep(write_sweep(tmp_path, "x", text))
    assert sweep.seeds == (5,) and "seed" not in sweep.base
    assert run_cli("sweep", write_sweep(tmp_path, "x", text + "seeds: [0]")) == 2
    assert "base.seed: write `seeds: [0, 1, 2]`" in last_line(capsys)


def test_results_of_a_users_code_are_not_those_of_another_version_of_it(tmp_path):
    file = tmp_path / "own.py"
    known = set()
    for code in ("a = 1", "a = 2", "a = 1"):
        file.write_text(code)
        known.add(tuple(run_sweep._own_code({"lr": 1.0, "augment": f"{file}:jitter", "objective": None})))
    assert len(known) == 2 and run_sweep._own_code({"lr": 1.0, "augment": f"{tmp_path}/none.py:x"}) == []


def test_a_run_file_can_be_the_base(swept, tmp_path):
    run = next((swept.out / "runs").glob("*/run.yaml")).parent
    file = write_sweep(tmp_path, "x", f"base: {run}/run.yaml\nsweep:\n  input-size: [16, 8]\nseeds: [0]\n")
    sweep = read_sweep(file)
    assert sweep.base["lr"] in (1e-3, 1e-2, 1e30) and sweep.space == {"input_size": (16, 8)}
    assert "--resize-size 9" in command_line(sweep, {"input_size": 8})


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
