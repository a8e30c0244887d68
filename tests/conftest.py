"""Shared fixtures, and markers by folder."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import shutil
from pathlib import Path

import pytest

# folder of tests to the marker of its files
FOLDERS = {"kernels": "interpreter", "distributed": "ranks"}
UNMARKED = {
    "test_plan.py",
    "test_tiled.py",
    "test_tune.py",
    "test_decisions.py",
    "test_rendezvous.py",
    "test_saves.py",
}  # run neither kernels nor processes


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/N", default="1/1", help="the Ith of N parts of the selected tests")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        marker = FOLDERS.get(item.path.parent.name)
        if marker and item.path.name not in UNMARKED:
            item.add_marker(marker)
    yield  # -m and -k select
    part, parts = map(int, config.getoption("--shard").split("/"))
    items[:] = items[part - 1 :: parts]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """A `folder` data set: 10 classes x 8 images to train on, 6 unseen classes x 4 to test."""
    # not above: tests of kernels alone start without timm and the trainer
    from tests.helpers import write_splits

    return write_splits(tmp_path_factory.mktemp("images"), (10, 8), (6, 4))


@pytest.fixture(scope="session")
def finished_run(image_folder, tmp_path_factory) -> Path:
    """A run of six steps on `image_folder`, to read only."""
    from tests.helpers import train_few

    out = tmp_path_factory.mktemp("finished") / "run"
    assert train_few(image_folder, out) == 0
    return out


@pytest.fixture
def trained_run(finished_run, tmp_path) -> Path:
    """A copy of `finished_run` in `tmp_path / "run"`."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
