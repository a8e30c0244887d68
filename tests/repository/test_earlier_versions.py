"""What version 0.1.0 wrote still resumes, evaluates and loads."""

import tarfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, folder_flags, loss_rows, read_metrics, run_cli


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    with tarfile.open(ROOT / "tests/data/run_0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def test_a_run_is_resumed(earlier):
    assert run_cli(*"train --resume run --max-iter 4 --data-path images".split()) == 0
    (last,) = [row for row in loss_rows(Path("run")) if row["step"] == 4]
    assert last["loss"] == pytest.approx(8.2704, abs=1e-3)


def test_a_run_its_model_and_its_packed_store_are_evaluated(earlier, caplog):
    before = read_metrics(Path("run"))
    assert run_cli("evaluate", "run", "--data-path", "images") == 0
    model = ["evaluate", "run/model.safetensors", *folder_flags("images"), "--rank", "1", "2"]
    assert run_cli(*model, "--output-dir", "files") == 0
    assert run_cli(*model, "--output-dir", "packed", "--packed", "store.pack") == 0
    for folder in ("files", "packed"):
        assert read_metrics(Path(folder)).items() >= before.items()
    assert "not the images" not in caplog.text
