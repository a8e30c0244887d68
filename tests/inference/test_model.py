"""`fastirt.load` and `Model.encode`: the run's own evaluation, from files and from memory."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastirt
from fastirt.errors import UserError
from fastirt.images.decoders import choose
from fastirt.inference.image_list import ImageList
from fastirt.inference.list_loader import ListLoader
from fastirt.inference.model import Model
from fastirt.inference.transform import Transform
from fastirt.model import onednn_linear
from fastirt.retrieval import evaluate as evaluate_module
from fastirt.retrieval.embed import embed
from fastirt.training.checkpoint import latest
from tests.helpers import CPU, DECODER, run_cli
from tests.images.every_kind import every_kind
from tests.images.image_files import config, write


@pytest.fixture(scope="module")
def model(finished_run) -> Model:
    return fastirt.load(finished_run)


@pytest.fixture(scope="module")
def files(image_folder) -> list[Path]:
    return sorted((image_folder / "test").rglob("*.jpg"))


def evaluated(run: Path, monkeypatch, *flags: object) -> tuple[list[str], np.ndarray]:
    """(files, vectors) of what `fastirt evaluate RUN` embeds."""
    seen = []

    def spy(encoder, loader, paths, **options):
        found = embed(encoder, loader, paths, **options)
        seen.append((list(paths), found.vectors.numpy()))
        return found

    monkeypatch.setattr(evaluate_module, "embed", spy)
    assert run_cli("evaluate", run, *flags) == 0
    return seen[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loader": "torchvision"},
        {"loader": "pil", "precision": "bf16", "orientation": "stored", "pooling": "max", "resize": "square"},
    ],
)
def test_encode_is_the_runs_evaluation_to_the_last_bit(trained_run, tmp_path, monkeypatch, options):
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    out = ["--output-dir", tmp_path / "evaluation"] if options else []
    files, expected = evaluated(trained_run, monkeypatch, *flags, *out)
    found = fastirt.load(trained_run, options=options).encode(files)
    assert found.dtype == np.float32 and np.array_equal(found, expected)
    assert np.array_equal(fastirt.load(trained_run, options=options).encode(Path(files[0]).parents[1]), expected)


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


@pytest.mark.parametrize("loader, levels", [("pil", 0), ("torchvision", 1)])
def test_images_of_every_kind_in_memory(tmp_path, loader, levels):
    """As their files: by Pillow to the last bit; by torchvision but for its rounding of resizes."""
    input = config(resize_size=33, loader=loader)
    paths = write(tmp_path, list(every_kind().values())).paths
    opened = [Image.open(path) for path in paths]

    def pixels(images) -> np.ndarray:
        loader = ListLoader(ImageList.of(images).source, 100, input, CPU, lambda *report: pytest.fail(str(report)))
        (batch,) = loader
        return batch.images.numpy().astype(int)

    expected = pixels(paths)
    assert np.abs(pixels(opened) - expected).max() <= levels
    transform = Transform(input, (0, 0, 0), (1 / 255,) * 3)
    found = torch.stack([transform(Image.open(path)) for path in paths]).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.rint(found) - expected).max() <= levels


@pytest.mark.parametrize(
    "array, byte",
    [
        (np.full((9, 7, 3), 201, np.uint8), 201),
        (np.full((9, 7, 3), 201 * 257, np.uint16), 201),
        (np.full((9, 7), 201 * 257, np.uint16), 201),
        (np.full((9, 7, 1), 201 / 255), 201),
        (np.full((9, 7, 3), 201 / 255, np.float32), 201),
        (np.full((9, 7, 4), 201, np.uint8), 201),
        (np.ones((9, 7), bool), 255),
    ],
)
def test_arrays_of_other_types(array, byte):
    transform = Transform(config(resize_size=33, loader="pil"), (0, 0, 0), (1 / 255,) * 3)
    assert np.allclose(transform(array), byte, atol=1e-3)
    (batch,) = ListLoader(ImageList.of(array).source, 1, config(loader="pil"), CPU, lambda *_: None)
    assert bool((batch.images == byte).all())


def test_load(finished_run, model, files, tmp_path, monkeypatch, caplog):
    run = finished_run / "model.safetensors", latest(finished_run)
    for source in run:
        loaded = fastirt.load(source, options={"loader": model.config.input.loader})
        assert loaded.digest == model.digest
        assert np.array_equal(loaded.encode(files[:3]), model.encode(files[:3]))
    assert fastirt.load(finished_run, options={"pooling": "max"}).digest != model.digest
    small = {"model_kwargs": ("depth=1",), "input_size": 32}
    random = fastirt.load("vit_tiny_patch16_224.augreg_in21k", pretrained=False, options=small)
    assert random.dim == 192 and random.config.input.orientation == "exif"
    assert random.digest == fastirt.load("vit_tiny_patch16_224.augreg_in21k", pretrained=False, options=small).digest
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text((finished_run / "config.json").read_text())
    tensors = load_file(run[0])
    save_file(tensors, tmp_path / "bare.safetensors")
    for arguments, message in (
        ({"source": tmp_path / "unfinished"}, "not a finished run"),
        ({"source": tmp_path / "bare.safetensors"}, "does not say which model"),
        ({"source": tmp_path}, "a folder without model.safetensors"),
        ({"source": tmp_path / "absent"}, "no run folder, no model file and no model of timm"),
        ({"source": finished_run, "device": "cuda:9"}, "no such device"),
        ({"source": finished_run, "options": {"poolng": "max"}}, "poolng: no such option; did you mean pooling"),
        ({"source": finished_run, "options": {"pooling": "maxx"}}, "pooling: 'maxx' is none of"),
        ({"source": finished_run, "options": {"input_size": "big"}}, "input_size: must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            fastirt.load(**arguments)


def test_a_decoder_that_this_machine_lacks(finished_run, model, files, monkeypatch, caplog):
    def missing():
        raise ImportError("no such module")

    expected = model.encode(files)
    monkeypatch.setitem(choose.CHECKS, model.config.input.loader, missing)
    loaded = fastirt.load(finished_run)
    assert loaded.config.input.loader != model.config.input.loader
    assert "taken instead" in caplog.text
    assert np.abs(loaded.encode(files) - expected).max() < 0.02


@pytest.mark.skipif(not onednn_linear.is_available(), reason="needs oneDNN")
def test_engine_onednn_differs_by_rounding(finished_run, model, files):
    fast = fastirt.load(finished_run, engine="onednn")
    difference = np.abs(fast.encode(files) - model.encode(files)).max()
    assert difference < 1e-5 and fast.digest == model.digest
    assert onednn_linear.AlwaysOneDnnLinear in map(type, fast.encoder.vit.modules())
    for arguments in ({"engine": "onednn", "options": {"precision": "bf16"}}, {"engine": "graph"}):
        with pytest.raises(UserError, match="engine"):
            fastirt.load(finished_run, **arguments)


def test_folders_with_links(model, files, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.jpg").write_bytes(files[0].read_bytes())
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "two.jpg").symlink_to(files[1])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    listed = ImageList.at(str(tmp_path / "a"))
    assert listed.names == ("b/one.jpg", "two.jpg")
    assert np.array_equal(model.encode(listed), model.encode(files[:2]))


@pytest.mark.parametrize("loader, tolerance", [("torchvision", 0), ("pil", 0), (DECODER, 0.02)])
def test_transform(finished_run, files, loader, tolerance):
    model = fastirt.load(finished_run, options={"loader": loader})
    transform = pickle.loads(pickle.dumps(model.transform))
    images = torch.stack([transform(Image.open(file)) for file in files])
    with torch.no_grad():
        vectors = model.encoder(images).numpy()
    assert np.abs(vectors - model.encode(files)).max() <= tolerance


def test_save(model, files, tmp_path):
    model.save(tmp_path / "model.safetensors")
    loaded = fastirt.load(tmp_path / "model.safetensors")
    assert loaded.digest == model.digest and len(model.digest) == 64
    assert np.array_equal(loaded.encode(files), model.encode(files))


def test_unreadable_images(model, files, tmp_path, caplog):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(files[0].read_bytes()[:300])
    bad = [tmp_path / "text.jpg", tmp_path / "absent.jpg", tmp_path / "cut.jpg"]
    assert np.isnan(model.encode(["a\0b.jpg", files[0]])).any(axis=1).tolist() == [True, False]
    found = model.encode([files[0], *bad, files[1]], batch_size=2)
    assert np.array_equal(found[[0, 4]], model.encode(files[:2])) and np.isnan(found[1:4]).all()
    assert all(any(str(path) in text for text in caplog.messages) for path in bad)
    reports = []
    assert np.isnan(model.encode(bad, on_bad=lambda *report: reports.append(report))).all()
    assert [(row, name) for row, name, _ in sorted(reports)] == [(row, str(path)) for row, path in enumerate(bad)]


def test_unreadable_images_in_memory(model, files, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(files[0].read_bytes()[:-300])
    reports = []
    found = model.encode([Image.open(tmp_path / "cut.jpg"), Image.open(files[0])], on_bad=lambda *r: reports.append(r))
    assert np.isnan(found[0]).all() and np.array_equal(found[1:], model.encode(files[:1]))
    assert reports == [(0, "image 0", reports[0][2])] and "truncated" in reports[0][2]


def test_threads_share_a_model(model, files):
    lists = [files[first::4] for first in range(4)]
    expected = [model.encode(part) for part in lists]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(model.encode, lists), expected))


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
    for image, message in ((str(files[0]), "a str"), (np.zeros((0, 4, 3), np.uint8), r"an array uint8 \(0, 4, 3\)")):
        with pytest.raises(UserError, match=f"image: {message}"):
            model.transform(image)
