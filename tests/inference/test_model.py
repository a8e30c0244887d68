"""`fastirt.load` and `Model.encode`: the run's own evaluation, from files and from memory."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastirt
from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.inference.model import Model
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.encoder import normalization_constants
from fastirt.model.precision import resolve_precision
from fastirt.retrieval.embed import embed
from tests.helpers import CPU


@pytest.fixture(scope="module")
def model(finished_run) -> Model:
    return fastirt.load(finished_run)


@pytest.fixture(scope="module")
def files(image_folder) -> list[Path]:
    return sorted((image_folder / "test").rglob("*.jpg"))


def evaluated(model: Model, data: Path, batch_size: int = 128) -> np.ndarray:
    """The test split as the evaluation of a run embeds it."""
    split = load_dataset("folder", str(data)).query
    mean, std = normalization_constants(model.config, model.encoder)
    loader = EvalLoader(split, batch_size=batch_size, input=model.config.input, device=CPU)
    dtype = resolve_precision(model.config.model.precision, CPU)
    return embed(
        model.encoder, loader, split.paths, mean=mean, std=std, device=CPU, dtype=dtype, progress=False
    ).vectors.numpy()


@pytest.mark.parametrize("options", [{}, {"loader": "torchvision"}, {"precision": "bf16", "orientation": "stored"}])
def test_encode_is_the_evaluation_to_the_last_bit(finished_run, image_folder, options):
    model = fastirt.load(finished_run, options=options)
    expected = evaluated(model, image_folder)
    found = model.encode(image_folder / "test")
    assert found.dtype == np.float32 and np.array_equal(found, expected)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_the_batch_size_changes_no_bit(model, files, batch_size):
    assert np.array_equal(model.encode(files, batch_size=batch_size), model.encode(files))


def test_images_in_memory_are_those_of_files(model, files):
    expected = model.encode(files)
    assert np.array_equal(model.encode([Image.open(file) for file in files]), expected)
    arrays = [np.asarray(Image.open(file)) for file in files]
    assert np.array_equal(model.encode(arrays), expected)
    assert np.array_equal(model.encode(np.stack(arrays)), expected)
    assert np.array_equal(model.encode(str(files[3])), expected[3:4])
    assert np.array_equal(model.encode(Image.open(files[3])), expected[3:4])
    assert np.array_equal(model.encode(arrays[3]), expected[3:4])


def test_transform(model, files):
    transform = pickle.loads(pickle.dumps(model.transform))
    images = torch.stack([transform(Image.open(file)) for file in files])
    with torch.no_grad():
        vectors = model.encoder(images).numpy()
    assert np.abs(vectors - model.encode(files)).max() < 0.02


def test_save(model, files, tmp_path):
    model.save(tmp_path / "model.safetensors")
    loaded = fastirt.load(tmp_path / "model.safetensors")
    assert loaded.digest == model.digest and len(model.digest) == 64
    assert np.array_equal(loaded.encode(files), model.encode(files))


def test_unreadable_images(model, files, tmp_path, caplog):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(files[0].read_bytes()[:300])
    bad = [tmp_path / "text.jpg", tmp_path / "absent.jpg", tmp_path / "cut.jpg"]
    found = model.encode([files[0], *bad, files[1]], batch_size=2)
    assert np.array_equal(found[[0, 4]], model.encode(files[:2])) and np.isnan(found[1:4]).all()
    assert all(any(str(path) in text for text in caplog.messages) for path in bad)
    reports = []
    assert np.isnan(model.encode(bad, on_bad=lambda *report: reports.append(report))).all()
    assert [(row, name) for row, name, _ in sorted(reports)] == [(row, str(path)) for row, path in enumerate(bad)]


def test_refusals(model, files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    for images, message in (
        ([], "empty list"),
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "empty", "no image"),
        (tmp_path / "texts", "no image"),
        ([files[0], Image.open(files[1])], "image 1 a PIL image"),
        ([3], "a list of int"),
        (None, "a NoneType"),
        (np.zeros((4, 4, 2), np.uint8), r"image 0: an array uint8 \(4, 4, 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            model.encode(images)
