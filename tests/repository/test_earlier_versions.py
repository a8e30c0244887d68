"""What version 0.1.0 wrote still resumes, evaluates and loads: a run of three steps, its packed store and its images."""

import json
import tarfile
from pathlib import Path

import pytest

from fastirt.cli import main


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    with tarfile.open(Path(__file__).parents[1] / "data/run_0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def test_a_run_is_resumed(earlier):
    assert main(["train", "--resume", "run", "--max-iter", "4", "--data-path", "images"]) == 0
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    (last,) = [row for row in rows if row["step"] == 4 and "loss" in row]
    assert last["loss"] == pytest.approx(8.2704, abs=1e-3)


def test_a_run_its_model_and_its_packed_store_are_evaluated(earlier, caplog):
    before = json.loads(Path("run/metrics.json").read_text())
    assert main(["evaluate", "run", "--data-path", "images"]) == 0
    images = ["--dataset", "folder", "--data-path", "images", "--rank", "1", "2", "--output-dir"]
    assert main(["evaluate", "run/model.safetensors", *images, "files"]) == 0
    assert main(["evaluate", "run/model.safetensors", *images, "packed", "--packed", "store.pack"]) == 0
    for folder in ("files", "packed"):
        assert json.loads(Path(folder, "metrics.json").read_text()) == before
    assert "not the images" not in caplog.text
