"""`fastirt embed`: files of vectors, resumption after a kill, ranks, and refusals."""

import csv
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import fastirt
from tests.distributed import launch
from tests.helpers import last_line, run_cli, run_python

# The exit of a process that is killed after its third batch, of which two are committed.
KILLED = """
import os, sys
from fastirt.cli import main
from fastirt.inference import partial_vectors
from fastirt.inference.partial_vectors import PartialVectors

write, batches = PartialVectors.write, []

def killed(self, *batch):
    partial_vectors.COMMIT_SECONDS = 0 if len(batches) < 2 else 1000
    write(self, *batch)
    batches.append(batch)
    if len(batches) == 3:
        os.kill(os.getpid(), 9)

PartialVectors.write = killed
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def images(image_folder, tmp_path_factory) -> Path:
    """24 images in class folders, and three more: a large one, a gray PNG, and one cut off."""
    folder = Path(shutil.copytree(image_folder / "test", tmp_path_factory.mktemp("embed") / "images"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(folder / "large.jpg")
    Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).save(folder / "gray.png")
    (folder / "cut.jpg").write_bytes((folder / "large.jpg").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def expected(finished_run, images) -> np.ndarray:
    return fastirt.load(finished_run).encode(images)


@pytest.fixture(scope="module")
def finished(finished_run, images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vectors") / "v.npy"
    assert run_cli("embed", finished_run, images, out, "--batch-size", 4) == 0
    return out


def read_rows(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def of_npy(out: Path) -> tuple[np.ndarray, list[dict], dict]:
    """(vectors, rows, description)"""
    rows = read_rows(Path(f"{out}.csv").read_text())
    return np.load(out, mmap_mode="r", allow_pickle=False), rows, json.loads(Path(f"{out}.json").read_text())


def test_npy(finished_run, images, expected, finished):
    vectors, rows, description = of_npy(finished)
    assert vectors.dtype == np.float32 and np.array_equal(vectors, expected, equal_nan=True)
    bad = np.isnan(expected).any(axis=1)
    assert bad.sum() == 1 and [row["bad"] for row in rows] == [str(int(value)) for value in bad]
    assert next(row for row in rows if row["bad"] == "1")["path"] == "cut.jpg"
    sizes = {row["path"]: (row["width"], row["height"]) for row in rows}
    assert sizes["large.jpg"] == ("70", "90") and sizes["gray.png"] == ("30", "20")
    assert sizes["class00/0.jpg"] == ("24", "24") and list(sizes) == sorted(sizes)
    assert description["model_digest"] == fastirt.load(finished_run).digest and description["bad"] == 1
    assert not [path for path in finished.parent.iterdir() if path.name.startswith(".")]


def test_safetensors(finished_run, images, expected, tmp_path):
    out = tmp_path / "v.safetensors"
    assert run_cli("embed", finished_run, images, out, "--dtype", "fp16") == 0
    with safe_open(out, "np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
        description = json.loads(file.metadata()["vectors"])
    assert np.array_equal(found["vectors"], expected.astype(np.float16), equal_nan=True)
    rows = read_rows(found["rows"].tobytes().decode())
    assert [row["path"] for row in rows][:2] == ["class00/0.jpg", "class00/1.jpg"]
    assert [[str(side) for side in size] for size in found["sizes"]] == [[row["width"], row["height"]] for row in rows]
    assert [bool(value) for value in found["bad"]] == [row["bad"] == "1" for row in rows]
    assert description["dtype"] == "fp16" and description["count"] == 27


def test_parquet_of_a_csv_with_metadata(finished_run, images, expected, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = ["path;brand;width", f"{images}/large.jpg;Ünion;9", f"{images}/cut.jpg;;8", f"{images}/absent.jpg;x;7"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    out = tmp_path / "v.parquet"
    assert run_cli("embed", finished_run, tmp_path / "list.csv", out) == 0
    table = parquet.read_table(out)
    assert table.column_names == ["path", "width", "height", "bad", "reason", "brand", "given_width", "vector"]
    assert table["brand"].to_pylist() == ["Ünion", "", "x"] and table["bad"].to_pylist() == [False, True, True]
    assert table["reason"].to_pylist()[2] == "no such file or directory"
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    assert np.array_equal(vectors[0], expected[-1]) and np.isnan(vectors[1:]).all()
    assert json.loads(table.schema.metadata[b"vectors"])["count"] == 3


@pytest.mark.slow
def test_a_killed_one_goes_on_to_the_same_bytes(finished_run, images, finished, tmp_path, capsys):
    out = tmp_path / "v.npy"
    words = [str(word) for word in ("embed", finished_run, images, out, "--batch-size", 4)]
    assert run_python(KILLED, *words).returncode == -signal.SIGKILL
    part = tmp_path / ".v.npy.part"
    assert not out.exists() and len((part / "log-0.jsonl").read_text().splitlines()) == 2
    with open(part / "log-0.jsonl", "a") as file:
        file.write('{"batches": [5')  # a line that was being written
    for other in (["--dtype", "fp16"], ["--pooling", "max"]):
        assert run_cli(*words, *other) == 2 and "--overwrite" in last_line(capsys)
    shutil.copytree(images, tmp_path / "copy")
    for other, named in ((images / "class00", "list of images"), (tmp_path / "copy", "folder of images")):
        assert run_cli("embed", finished_run, other, out, "--batch-size", 4) == 2
        assert named in last_line(capsys)
    shutil.rmtree(tmp_path / "copy")
    assert run_cli(*words) == 0
    assert "embedded 19 images" in capsys.readouterr().out  # of 27, 8 of them committed before
    for name in ("v.npy", "v.npy.csv", "v.npy.json"):
        assert (tmp_path / name).read_bytes() == (finished.parent / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.npy", "v.npy.csv", "v.npy.json"]
    assert run_cli(*words) == 2 and "exists: pass --overwrite" in last_line(capsys)
    assert run_cli(*words, "--overwrite", "--dtype", "fp16") == 0 and np.load(out).dtype == np.float16


@pytest.mark.ranks
def test_ranks_write_the_bytes_of_one(finished_run, images, finished, tmp_path):
    launch.run(
        2, "-m", "fastirt", "embed", str(finished_run), str(images), str(tmp_path / "v.npy"), "--batch-size", "4"
    )
    for name in ("v.npy", "v.npy.csv", "v.npy.json"):
        assert (tmp_path / name).read_bytes() == (finished.parent / name).read_bytes()


def test_a_list_on_stdin_of_nothing_readable(finished_run, images, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jpg").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text.jpg\nabsent.jpg\r\n\ntext.jpg\n")))
    assert run_cli("embed", finished_run, "-", "v.npy", "--batch-size", 2) == 0
    assert "3 unreadable" in capsys.readouterr().out
    vectors, rows, _ = of_npy(tmp_path / "v.npy")
    assert np.isnan(vectors).all() and [row["path"] for row in rows] == ["text.jpg", "absent.jpg", "text.jpg"]


def test_packed_store(finished_run, image_folder, tmp_path, capsys):
    store = tmp_path / "store.bin"
    pack = ["pack", store, "--dataset", "folder", "--data-path", image_folder, "--workers", 1]
    assert run_cli(*pack, "--input-size", 16, "--resize-size", 18, "--resize", "shorter") == 0
    assert run_cli("embed", finished_run, store, tmp_path / "v.npy") == 0
    vectors, rows, _ = of_npy(tmp_path / "v.npy")
    assert len(vectors) == 80 + 24 and np.isfinite(vectors).all()
    assert {row["split"] for row in rows} == {"train", "test"} and rows[0]["label"] == "class00"
    assert (rows[0]["width"], rows[0]["height"]) == ("18", "18")
    assert run_cli("embed", finished_run, store, tmp_path / "w.npy", "--resize-size", 20) == 2
    assert "--resize-size is 18 in the store" in last_line(capsys)


def test_refusals(finished_run, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_path.csv").write_text("file,brand\na.jpg,b\n")
    npy = tmp_path / "v.npy"
    for words, message in (
        ((finished_run, images, tmp_path / "v.txt"), ".npy, .safetensors, .parquet"),
        ((finished_run, tmp_path / "empty", npy), "no image in or below it"),
        ((finished_run, tmp_path / "absent", npy), "no such folder or file"),
        ((finished_run, tmp_path / "no_path.csv", npy), "columns are called path"),
        ((tmp_path / "empty", images, npy), "empty"),
        (("deit_tny", images, npy), "close names: "),
        ((finished_run, images, npy, "--weights", "x.pth"), "x.pth"),
        ((finished_run, images, npy, "--batch-size", 0), "--batch-size 0: must be at least 1"),
    ):
        assert run_cli("embed", *words) == 2
        assert message in last_line(capsys)
    assert not npy.exists() and not (tmp_path / ".v.npy.part").exists()


def test_a_timm_model_with_a_file_of_weights(finished_run, images, expected, tmp_path):
    model = fastirt.load(finished_run)
    config = model.config.model
    flags = ["--weights", finished_run / "model.safetensors", "--model-kwargs", *config.model_kwargs]
    assert (
        run_cli("embed", config.model, images, tmp_path / "v.npy", *flags, "--loader", model.config.input.loader) == 0
    )
    assert np.array_equal(np.load(tmp_path / "v.npy"), expected, equal_nan=True)
    assert os.path.getsize(tmp_path / "v.npy") == 128 + expected.nbytes


def test_names_with_line_ends_and_spaces_of_other_kinds(finished_run, images, tmp_path, monkeypatch, capsys):
    names = ["a\rb.jpg", "a\nb.jpg", "at 10.00\u202fPM.png", "b\udcff.jpg"]
    for name in names:
        shutil.copy(images / "large.jpg", tmp_path / name)
    listed = io.TextIOWrapper(io.BytesIO(b"".join(os.fsencode(name) + b"\0" for name in names)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", listed)
    assert run_cli("embed", finished_run, "-", "v.npy") == 0
    assert ", 0 unreadable" in capsys.readouterr().out
    with open("v.npy.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run_cli("embed", finished_run, tmp_path, "v.parquet") == 0
    assert sorted(parquet.read_table("v.parquet")["path"].to_pylist()) == sorted([*names[:3], "b\\udcff.jpg"])


def test_files_of_a_user_beside_out_stay(finished_run, images, tmp_path, capsys):
    listed = tmp_path / "v.npy.csv"
    listed.write_text(f"path,width,given_width\n{images}/large.jpg,1,2\n")
    written = listed.read_text()
    assert run_cli("embed", finished_run, listed, tmp_path / "v.npy") == 2
    assert "v.npy.csv: exists" in last_line(capsys)
    assert run_cli("embed", finished_run, listed, tmp_path / "v.npy", "--overwrite") == 2
    assert "would replace the list of images" in last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [listed.name] and listed.read_text() == written
    assert run_cli("embed", finished_run, listed, tmp_path / "w.npy") == 0
    rows = list(csv.DictReader((tmp_path / "w.npy.csv").open()))
    assert (rows[0]["given_width"], rows[0]["given_given_width"]) == ("2", "1")
