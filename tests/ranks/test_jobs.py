"""Whole jobs under torchrun: the same run on any number of ranks, resumption on another number, faults of every kind."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, write_images
from ranks.launch import torchrun

HERE = Path(__file__).parent


def arguments(pictures: Path, out: Path, *more: str, steps: int = 20) -> list[str]:
    return [
        "train", "--dataset", "folder", "--data-path", str(pictures), "--output-dir", str(out), *TINY, "--recipe", "unofficial",
        "--max-iter", str(steps), "--batch-size", "8", "--m-per-class", "2", "--opt", "sgd", "--lr", "1e-3", "--rank", "1", "--logging-freq", "2",
        "--save-freq", "5", "--encoder-momentum", "0.9", "--memory-start", "3", "--eval-batch-size", "5", *more,
    ]  # fmt: skip


def alone(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fastirt", *arguments],
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def job(size: int, *command: str, code: int | None = 0, timeout: float = 120, **given) -> str:
    """A torchrun job that must end with `code` (None: any error); its output."""
    process = torchrun(size, *command, **given)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code or (code is None and process.returncode), (process.returncode, output[-4000:])
    return output


def faulty(kind: str, at: int, rank: int, *arguments: str) -> list[str]:
    return [str(HERE / "faulty.py"), kind, str(at), str(rank), *arguments]


def curve(out: Path) -> list[dict]:
    names = ("step", "lr", "loss", "contrastive_batch", "contrastive_memory", "koleo", "grad_norm")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in names} for row in rows if "loss" in row]


def assert_same_curve(found: Path, expected: Path) -> None:
    """Up to float32 rounding in another order of summation. The optimiser is SGD: AdamW amplifies rounding threefold a step here, to
    3e-3 of the loss after 20."""
    ours, theirs = curve(found), curve(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def assert_same_weights(found: Path, expected: Path) -> None:
    a, b = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Images with two bad ones in the training split, one of them a class to itself, and one in the test split: 23 others there."""
    root = tmp_path_factory.mktemp("mixed")
    write_images(root / "train", 9, 6)
    write_images(root / "test", 6, 4, seed=1)
    for name in ("train/class03/2.jpg", "test/class02/1.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:200])
    (root / "train/class09").mkdir()
    (root / "train/class09/0.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mixed) -> Path:
    """The same run on one rank (`one`) and on two (`two`)."""
    root = tmp_path_factory.mktemp("runs")
    alone(*arguments(mixed, root / "one"))
    (root / "two.txt").write_text(job(2, "-m", "fastirt", *arguments(mixed, root / "two")))
    return root


def test_two_ranks_run_as_one(runs):
    assert_same_curve(runs / "two", runs / "one")
    one, two = (json.loads((runs / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=0.05) and two["queries"] == one["queries"] == 23 and two["bad"] == 1
    bad = [(runs / name / "bad_pictures.csv").read_text().splitlines() for name in ("one", "two")]
    assert [sorted(line.rpartition(",")[0] for line in lines) for lines in bad][0] == sorted(
        line.rpartition(",")[0] for line in bad[1]
    )
    text = (runs / "two.txt").read_text()
    assert text.count("bad image:") == 3 and text.count("step 20/20") == 1 and text.count("| this run") == 1
    assert json.loads((runs / "two/log.jsonl").read_text().splitlines()[0])["wire_mb"] > 0


def test_evaluation_is_the_same_on_any_number_of_ranks(runs, tmp_path):
    """One image more than fits: 24 images in batches of 5 on 1, 2 and 3 ranks."""
    expected = json.loads((runs / "one/metrics.json").read_text())
    for size in (2, 3):
        output = job(size, "-m", "fastirt", "evaluate", str(runs / "one"))
        found = json.loads((runs / "one/metrics.json").read_text())
        assert found == expected and output.count("| this run") == 1


@pytest.mark.parametrize("before, after", [((), ("--memory-sharded",)), (("--memory-sharded",), ())])
def test_resumed_on_another_number_of_ranks(runs, mixed, tmp_path, before, after):
    """From one rank to two and back; the memory whole or in shards."""
    out = tmp_path / "run"
    sizes = (1, 2) if after else (3 - 1, 1)
    for size, steps, flags in ((sizes[0], 10, before), (sizes[1], 20, after)):
        command = arguments(mixed, out, "--resume", *flags, steps=steps)
        if size == 1:
            alone(*command, *(() if flags else ("--no-memory-sharded",)))
        else:
            job(size, "-m", "fastirt", *command)
    files = sorted(path.name for path in (out / "checkpoints").iterdir())
    shards = ["memory_00000015_1-of-2", "memory_00000015_2-of-2", "memory_00000020_1-of-2", "memory_00000020_2-of-2"]
    steps = ["step_00000015", "step_00000020"]
    assert [name.removesuffix(".safetensors") for name in files] == (shards + steps if after else steps)
    assert_same_curve(out, runs / "one")


def test_a_killed_rank_is_named_and_a_restart_equals_the_undisturbed_run(runs, mixed, tmp_path):
    out = tmp_path / "run"
    start = time.monotonic()
    output = job(2, *faulty("kill", 12, 1, *arguments(mixed, out)), code=1)
    assert time.monotonic() - start < 60
    assert re.search(r"rank 0: error: rank 1 \(pid \d+\) exited unexpectedly", output), output
    assert not list((out / "checkpoints").glob("*00000013*"))  # whoever is left saves nothing
    # On four ranks, since of two it does not matter in which order they are added.
    job(4, "-m", "fastirt", *arguments(mixed, tmp_path / "four"))
    again = tmp_path / "again"
    output = job(4, *faulty("kill", 12, 0, *arguments(mixed, again)), options=("--max-restarts=1",))
    assert "resumed" in output and re.search(r"rank [123]: error: rank 0 \(pid \d+\) exited unexpectedly", output), (
        output
    )
    assert_same_weights(again, tmp_path / "four")
    assert curve(again) == curve(tmp_path / "four")


@pytest.mark.parametrize("whom", ["agent", "one rank"])
def test_preemption_leaves_one_checkpoint_and_loses_nothing(runs, mixed, tmp_path, whom):
    """Ranks that were not told stop with the one that was."""
    out = tmp_path / "run"
    kind = "term" if whom == "agent" else "term-one"
    output = job(2, *faulty(kind, 11, 1, *arguments(mixed, out, "--memory-sharded")), code=1)
    stopped = re.search(r"stopped by signal 15 at step (\d+); saved .*: go on with --resume", output)
    assert stopped and 12 <= int(stopped[1]) <= 16, output
    newest = sorted((out / "checkpoints").glob("step_*"))[-1]
    assert newest.stem == f"step_{int(stopped[1]):08d}"
    job(2, "-m", "fastirt", *arguments(mixed, out, "--memory-sharded", "--resume"))
    assert_same_curve(out, runs / "one")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("lr", r"rank 1 differs from rank 0 in --lr \(0.0005 instead of 0.001\)"),
        ("seed", r"rank 1 differs from rank 0 in weights \([0-9a-f]+ instead of [0-9a-f]+\)"),
        ("data", r"rank 1 differs from rank 0 in data set \([0-9a-f]+ instead of [0-9a-f]+\)"),
        ("code", r"rank 1 differs from rank 0 in code of fastirt \(another instead of [0-9a-f]+\)"),
        ("weights", r"step 5: weights of rank 1 no longer equal"),
        ("ring", r"step 5: memory of rank 1 no longer equal"),  # two rows changed places
        ("nan", r"rank 0: error: non-finite loss or gradient first in step 7, no update since"),  # no step that saves
    ],
)
def test_ranks_that_differ_are_refused(mixed, tmp_path, kind, message):
    if kind == "data":
        mixed = Path(shutil.copytree(mixed, tmp_path / "data"))
        shutil.copytree(mixed, tmp_path / "data-other")
        (tmp_path / "data-other/train/class00/0.jpg").unlink()
    output = job(2, *faulty(kind, 5 if kind == "nan" else 3, 1, *arguments(mixed, tmp_path / "run")), code=1)
    assert re.search(message, output) and output.count(": error: ") == 1, output  # all ranks raise it, one says it
    assert "Error" not in output.split("ChildFailedError")[0].replace("error:", ""), output


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(mixed, tmp_path):
    out = tmp_path / "run"
    output = job(2, *faulty("full", 7, 0, *arguments(mixed, out)), code=1)
    assert re.search(r"rank 0: error: .*step_00000010.safetensors: cannot be written", output), output
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000005.safetensors"]
    out = tmp_path / "sharded"
    output = job(2, *faulty("full", 7, 1, *arguments(mixed, out, "--memory-sharded", "--memory-ratio", "20")), code=1)
    assert re.search(r"rank 1: error: .*memory_00000010_2-of-2.safetensors: cannot be written", output), output
    assert "step_00000010.safetensors" not in {path.name for path in (out / "checkpoints").iterdir()}
    job(2, "-m", "fastirt", *arguments(mixed, out, "--memory-sharded", "--memory-ratio", "20", "--resume", steps=12))


def test_a_data_folder_that_disappears_is_no_bad_picture(runs, mixed, tmp_path):
    """Without a cache every epoch reads; the run stops and, once the folder is back, goes on as if nothing had been."""
    data = Path(shutil.copytree(mixed, tmp_path / "data"))
    command = arguments(data, tmp_path / "run", "--cache", "none", "--resume")
    output = job(2, *faulty("gone", 7, 1, *command), code=1)
    assert re.search(r"error: .*/data.*: the folder of the images is gone \(.*\): bring it back", output), output
    assert output.count("bad image:") == 2  # the two of the training split
    (tmp_path / "moved").rename(data)
    job(2, "-m", "fastirt", *command)
    assert_same_curve(tmp_path / "run", runs / "two")


def test_user_errors_are_one_line(mixed, tmp_path):
    output = job(3, "-m", "fastirt", *arguments(mixed, tmp_path / "a"), code=1)
    assert "--batch-size 8: must be divisible by the number of ranks, 3: use 6 or 12" in output
    output = job(2, "-m", "fastirt", *arguments(tmp_path / "nowhere", tmp_path / "b"), code=1)
    assert "nowhere" in output and "Traceback" not in output.split("torch/distributed")[0]
    output = job(2, "-m", "fastirt", *arguments(mixed, Path("/proc/run")), code=1)
    assert output.count("--output-dir /proc/run: cannot write there") == 1, output
