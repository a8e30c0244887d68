"""Shared fixtures: little images, a little model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

try:
    import nvidia.dali  # noqa: F401

    DECODER = "dali"
except ImportError:  # a machine that only runs the GPU's tests may lack it
    DECODER = "pil"
needs_dali = pytest.mark.skipif(DECODER != "dali", reason="needs NVIDIA DALI")

TINY_KWARGS = ("patch_size=8", "embed_dim=48", "depth=2", "num_heads=3")
TINY = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-kwargs",
    *TINY_KWARGS,
    "--weights",
    "scratch",
    "--input-size",
    "16",
    "--resize-size",
    "18",
    "--device",
    "cpu",
    "--num-workers",
    "2",
    "--loader",
    DECODER,
]


def write_images(folder: Path, classes: int, views: int, size: int = 24, seed: int = 0) -> None:
    """Class folders of JPEG images: each class a colour, each view noise on top."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        colour = rng.integers(40, 216, 3)
        (folder / f"class{label:02d}").mkdir(parents=True)
        for view in range(views):
            pixels = np.clip(colour + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label:02d}" / f"{view}.jpg", quality=92)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A `folder` data set: 10 classes x 8 images to train on, 6 unseen classes x 4 to test."""
    root = tmp_path_factory.mktemp("pictures")
    write_images(root / "train", 10, 8)
    write_images(root / "test", 6, 4, seed=1)
    return root


FOLDERS = {"kernels": "interpreter", "distributed": "ranks"}  # folder of tests to the marker of its files
UNMARKED = {"test_plan.py", "test_decisions.py", "test_rendezvous.py"}  # neither kernels nor processes


def pytest_collection_modifyitems(items):
    for item in items:
        marker = FOLDERS.get(item.path.parent.name)
        if marker and item.path.name not in UNMARKED:
            item.add_marker(marker)
