"""Jobs under torchrun: one run on any number of ranks, resumption on another, and faults."""

import re
import shutil
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import alone, arguments, assert_same_curve, curve, faulty, job
from tests.helpers import assert_same_weights, read_log, read_metrics, write_splits


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Images with two bad ones in the training split, one of them a class to itself, and one in the
    test split: 23 others there."""
    root = write_splits(tmp_path_factory.mktemp("mixed"), (9, 6), (6, 4))
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
    one, two = (read_metrics(runs / name) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=0.05)
    assert one["queries"] == two["queries"] == 23
    assert two["bad"] == 1
    bad = [(runs / name / "bad_pictures.csv").read_text().splitlines() for name in ("one", "two")]
    # without the step
    one_bad, two_bad = (sorted(line.rpartition(",")[0] for line in lines) for lines in bad)
    assert one_bad == two_bad
    text = (runs / "two.txt").read_text()
    assert [text.count(words) for words in ("bad image:", "step 20/20", "| this run")] == [3, 1, 1]
    assert read_log(runs / "two")[0]["wire_mb"] > 0


def test_evaluation_is_the_same_on_any_number_of_ranks(runs, tmp_path):
    """One image more than fits: 24 images in batches of 5 on 1, 2 and 3 ranks."""
    expected = read_metrics(runs / "one")
    for size in (2, 3):
        output = job(size, "-m", "fastirt", "evaluate", str(runs / "one"))
        assert read_metrics(runs / "one") == expected
        assert output.count("| this run") == 1


@pytest.mark.parametrize("before, after", [((), ("--memory-sharded",)), (("--memory-sharded",), ())])
def test_resumed_on_another_number_of_ranks(runs, mixed, tmp_path, before, after):
    """From one rank to two and back; the memory whole or in shards."""
    out = tmp_path / "run"
    sizes = (1, 2) if after else (2, 1)
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
    assert re.search(r"rank 0: error: rank 1 \(pid \d+\) exited", output), output
    assert not list((out / "checkpoints").glob("*00000013*"))  # whoever is left saves nothing
    # On four ranks, since of two it does not matter in which order they are added.
    job(4, "-m", "fastirt", *arguments(mixed, tmp_path / "four"))
    again = tmp_path / "again"
    output = job(4, *faulty("kill", 12, 0, *arguments(mixed, again)), options=("--max-restarts=1",))
    assert re.search(r"rank [123]: error: rank 0 \(pid \d+\) exited", output), output
    assert "resumed" in output
    assert_same_weights(again, tmp_path / "four")
    assert curve(again) == curve(tmp_path / "four")


@pytest.mark.parametrize("whom", ["agent", "one rank"])
def test_preemption_leaves_one_checkpoint_and_loses_nothing(runs, mixed, tmp_path, whom):
    """Ranks that were not told stop with the one that was."""
    out = tmp_path / "run"
    kind = "term" if whom == "agent" else "term-one"
    output = job(2, *faulty(kind, 11, 1, *arguments(mixed, out, "--memory-sharded")), code=1)
    stopped = re.search(r"signal 15 at step (\d+); saved .*--resume", output)
    assert stopped and 12 <= int(stopped[1]) <= 16, output
    newest = sorted((out / "checkpoints").glob("step_*"))[-1]
    assert newest.stem == f"step_{int(stopped[1]):08d}"
    job(2, "-m", "fastirt", *arguments(mixed, out, "--memory-sharded", "--resume"))
    assert_same_curve(out, runs / "one")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("lr", r"rank 1 differs from rank 0 in --lr \(0.0005 instead of 0.0003\)"),
        ("seed", r"rank 1 differs from rank 0 in weights \([0-9a-f]+ instead of [0-9a-f]+\)"),
        ("data", r"rank 1 differs from rank 0 in data set \([0-9a-f]+ instead of [0-9a-f]+\)"),
        ("code", r"rank 1 differs from rank 0 in code of fastirt \(another instead of [0-9a-f]+\)"),
        ("weights", r"step 5: weights of rank 1"),
        ("ring", r"step 5: memory of rank 1"),  # two rows changed places
        ("nan", r"rank 0: error: non-finite .* in step 7"),  # no step that saves
    ],
)
def test_ranks_that_differ_are_refused(mixed, tmp_path, kind, message):
    if kind == "data":
        mixed = Path(shutil.copytree(mixed, tmp_path / "data"))
        shutil.copytree(mixed, tmp_path / "data-other")
        (tmp_path / "data-other/train/class00/0.jpg").unlink()
    output = job(2, *faulty(kind, 5 if kind == "nan" else 3, 1, *arguments(mixed, tmp_path / "run")), code=1)
    # all ranks raise it, one says it
    assert re.search(message, output) and output.count(": error: ") == 1, output
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


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_save_by_time_at_the_step_that_rank_0_names(mixed, tmp_path, rank):
    out = tmp_path / "run"
    flags = "--memory-sharded --save-freq 0 --save-seconds 900 --keep 9".split()
    job(2, *faulty("clock", 5, rank, *arguments(mixed, out, *flags)))
    found = [path.stem.removeprefix("step_") for path in sorted((out / "checkpoints").glob("step_*"))]
    assert len(found) == 2 - rank and 6 <= int(found[0]) <= 20, found
    shards = [f"memory_{step}_{part}-of-2.safetensors" for step in found for part in (1, 2)]
    assert sorted(path.name for path in (out / "checkpoints").glob("memory_*")) == shards


def test_a_data_folder_that_disappears_is_no_bad_image(runs, mixed, tmp_path):
    """Without a cache every epoch reads; the run stops and, once the folder is back, goes on as if
    nothing had been."""
    data = Path(shutil.copytree(mixed, tmp_path / "data"))
    command = arguments(data, tmp_path / "run", "--cache", "none", "--resume")
    output = job(2, *faulty("gone", 7, 1, *command), code=1)
    assert re.search(r"error: .*/data.*: the folder of the images is gone", output), output
    assert output.count("bad image:") == 2  # the two of the training split
    (tmp_path / "moved").rename(data)
    job(2, "-m", "fastirt", *command)
    assert_same_curve(tmp_path / "run", runs / "two")


def test_user_errors_are_one_line(mixed, tmp_path):
    output = job(3, "-m", "fastirt", *arguments(mixed, tmp_path / "a"), code=1)
    assert re.search(r"--batch-size 8: .* 3 ranks .* 6 or 12", output), output
    output = job(2, "-m", "fastirt", *arguments(tmp_path / "nowhere", tmp_path / "b"), code=1)
    assert "nowhere" in output and "Traceback" not in output.split("torch/distributed")[0]
    output = job(2, "-m", "fastirt", *arguments(mixed, Path("/proc/run")), code=1)
    assert output.count("--output-dir /proc/run: cannot write there") == 1, output
