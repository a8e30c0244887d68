"""Unreadable images: named once, replaced by another of their class, never scored."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.train_loader import TrainLoader
from tests.helpers import CPU, FAST_LOADERS, run_python, tiny_input, tiny_loader, write_splits
from tests.images.broken_files import broken_files, undecodable


@pytest.fixture
def broken_set(tmp_path):
    """8 classes x 16 images, into which every kind of broken file is put."""
    write_splits(tmp_path, (8, 12), (4, 4))
    for number, data in enumerate([*broken_files().values(), undecodable()]):
        (tmp_path / f"train/class{number % 8:02d}/bad{number}.jpg").write_bytes(data)
    (tmp_path / "test/class00/bad.jpg").write_bytes(undecodable())
    (tmp_path / "test/class01/bad.jpg").write_bytes(b"")
    return tmp_path


LOOP = """
import sys, torch
from pathlib import Path
from fastirt.datasets import load_dataset
from fastirt.config.options import Config
from fastirt.loading.train_loader import train_loader
catalog = load_dataset("folder", sys.argv[1])
split = catalog.train
config = Config().replace(
    batch_size=48, m=6, max_iter=60, input_size=16, resize_size=18, num_workers=2, cache="none", loader=sys.argv[3]
)
loader = train_loader(catalog, config, torch.device("cpu"), csv_path=Path(sys.argv[2]))
for batch in loader:
    assert not any(Path(split.paths[i]).name.startswith("bad") for i in batch.indices), batch.step
    assert batch.labels.tolist() == split.labels[batch.indices].tolist()
    assert len(batch.images) == 48
print(len(loader.bad), sum(Path(p).name.startswith("bad") for p in split.paths))
"""


@pytest.mark.slow
@pytest.mark.parametrize("loader", FAST_LOADERS)
def test_all_kinds_of_broken_file_many_times_in_large_batches(broken_set, tmp_path, loader):
    """In a process of its own: a decoder that crashes is a failure, not the end of the tests."""
    done = run_python(LOOP, broken_set, tmp_path / "bad.csv", loader, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found, planted = map(int, done.stdout.split())
    assert found == planted == 34
    rows = list(csv.reader(open(tmp_path / "bad.csv")))
    assert rows[0] == ["path", "reason", "step"]
    assert len(rows) == len({row[0] for row in rows}) == 35
    assert done.stderr.count("bad image:") == 34


def training(root, **options):
    """The training split, and its loader."""
    catalog = load_dataset("folder", str(root))
    return catalog.train, tiny_loader(catalog, **{**dict(batch_size=16, m=4, max_iter=12), **options})


@pytest.mark.parametrize("loader", FAST_LOADERS)
def test_batches_are_the_same_whether_bad_images_are_known_or_found(broken_set, loader):
    _, fresh = training(broken_set, loader=loader)
    found = [(b.indices.tolist(), b.images.clone()) for b in fresh]
    _, resumed = training(broken_set, start_step=5, bad=fresh.bad, loader=loader)
    again = [(b.indices.tolist(), b.images.clone()) for b in resumed]
    for (rows, images), (other_rows, other_images) in zip(found[5:], again, strict=True):
        assert rows == other_rows
        assert torch.equal(images, other_images)


def test_a_file_is_named_once_also_after_a_resumption(broken_set, tmp_path, caplog):
    for _ in range(2):
        _, loader = training(broken_set, csv_path=tmp_path / "bad.csv")
        list(loader)
    names = [row[0] for row in csv.reader(open(tmp_path / "bad.csv"))]
    assert len(names) == len(set(names)) > 10
    assert caplog.text.count("bad image:") == len(names) - 1


def test_a_class_without_images_leaves_the_sampler_by_name(tmp_path, caplog):
    write_splits(tmp_path, (6, 4), (2, 2))
    for path in (tmp_path / "train/class03").iterdir():
        path.write_bytes(b"")
    _, loader = training(tmp_path, batch_size=8, m=2, max_iter=20)
    assert all(3 not in batch.labels for batch in loader)
    assert caplog.text.count("class 3 (class03) has no readable image left") == 1


def test_without_class_names_each_emptied_class_is_named_by_its_own_folder(tmp_path, caplog):
    """Six of twelve classes are empty, so the first batch finds several at once."""
    write_splits(tmp_path, (12, 2), (2, 2))
    for label in range(0, 12, 2):
        for path in (tmp_path / f"train/class{label:02d}").iterdir():
            path.write_bytes(b"")
    _, named = training(tmp_path, batch_size=12, m=2)
    assert len(list(TrainLoader(named.sampler, named.images, stop_step=4))) == 4
    for label in range(0, 12, 2):
        assert caplog.text.count(f"class {label} ({tmp_path}/train/class{label:02d}) has no readable image left") == 1


def test_more_than_max_bad_stops_with_one_clear_line(broken_set, tmp_path):
    _, loader = training(broken_set, max_bad=3, csv_path=tmp_path / "bad.csv")
    with pytest.raises(UserError, match="more than 3 .*--max-bad"):
        list(loader)


@pytest.mark.parametrize("backend", [*FAST_LOADERS, "pil"])
def test_evaluation_leaves_bad_images_out(broken_set, backend, caplog):
    split = load_dataset("folder", str(broken_set)).query
    loader = EvalLoader(split, batch_size=8, input=tiny_input(loader=backend), device=CPU)
    rows = np.concatenate([b.indices[: b.valid] for b in loader])
    planted = [row for row, path in enumerate(split.paths) if Path(path).name == "bad.jpg"]
    assert sorted(loader.bad) == planted
    assert sorted(set(range(len(split))) - set(rows.tolist())) == planted
    assert len(rows) == len(set(rows)) == 16
    assert caplog.text.count("bad image:") == 2


def test_an_image_that_disappears_is_a_bad_one(broken_set):
    split, loader = training(broken_set)
    gone = Path(split.paths[0])
    gone.unlink()
    list(loader)
    assert 0 in loader.bad


def test_a_folder_that_disappears_blames_no_image(broken_set, tmp_path):
    split, loader = training(broken_set)
    root = Path(split.paths[0]).parent.parent
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{root.name}: .* gone .*--resume"):
        list(loader)
    assert not loader.bad
