"""Shared fixtures, and markers by folder."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from pathlib import Path

import pytest

from tests.helpers import write_splits

FOLDERS = {"kernels": "interpreter", "distributed": "ranks"}  # folder of tests to the marker of its files
UNMARKED = {"test_plan.py", "test_decisions.py", "test_rendezvous.py"}  # neither kernels nor processes


def pytest_collection_modifyitems(items):
    for item in items:
        marker = FOLDERS.get(item.path.parent.name)
        if marker and item.path.name not in UNMARKED:
            item.add_marker(marker)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A `folder` data set: 10 classes x 8 images to train on, 6 unseen classes x 4 to test."""
    return write_splits(tmp_path_factory.mktemp("pictures"), (10, 8), (6, 4))
