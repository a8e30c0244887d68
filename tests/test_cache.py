"""The decoded cache: the same batches as without it, each image decoded once, in the memory it was given."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import DECODER, TINY, needs_dali, write_images
from fastirt.cli import main
from fastirt.config.options import InputConfig
from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.images.normalize import normalize
from fastirt.images.pack import PackedStore, pack
from fastirt.images.source import FileSource
from fastirt.loading import cache_budget
from fastirt.loading.cache_budget import image_shapes, make_cache
from fastirt.loading.cached_train_loader import CachedTrainLoader
from fastirt.loading.image_cache import ImageCache
from fastirt.loading.train_loader import TrainLoader
from fastirt.step.step_input import StepInput

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
PLACES = ["host", "device"] if DEVICE.type == "cuda" else ["host"]


@pytest.fixture
def mixed(tmp_path):
    """10 classes x 6 images of many shapes, two of them unreadable."""
    write_images(tmp_path / "mixed" / "train", 10, 6)
    write_images(tmp_path / "mixed" / "test", 2, 2)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "mixed" / "train").rglob("*.jpg"))[::3]:
        height, width = rng.integers(17, 70, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    (tmp_path / "mixed/train/class01/3.jpg").write_bytes(b"not an image")
    whole = (tmp_path / "mixed/train/class04/2.jpg").read_bytes()
    (tmp_path / "mixed/train/class04/2.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "mixed"


def loader(folder, place, stop=9, start=0, m=2, store=None, **changes):
    split = load_dataset("folder", str(folder)).train
    config = InputConfig(**{**dict(input_size=16, resize_size=18, num_workers=2, loader=DECODER), **changes})
    given = dict(batch_size=8, m=m, seed=3, input=config, device=DEVICE, start_step=start, stop_step=stop, store=store)
    if place == "none":
        return TrainLoader(split, **given)
    cache = make_cache(place, store or FileSource(split.paths), config, DEVICE)
    return CachedTrainLoader(split, **given, cache=cache)


def batches(loader):
    found = [(b.step, b.indices.tolist(), b.labels.tolist(), b.pixels().clone()) for b in loader]
    loader.close()
    return found


def equal(a, b):
    return len(a) == len(b) > 0 and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("resize", ["square", "shorter"])
@pytest.mark.parametrize(
    "decoder, m", [pytest.param("dali", 2, marks=needs_dali), pytest.param("dali", 0, marks=needs_dali), ("pil", 2)]
)
def test_batches_are_those_without_it(mixed, place, resize, decoder, m):
    """Bit for bit, bad images and all, and wherever the run begins."""
    plain = batches(loader(mixed, "none", resize=resize, loader=decoder, m=m))
    cached = loader(mixed, place, resize=resize, loader=decoder, m=m)
    assert equal(batches(cached), plain)
    assert equal(batches(loader(mixed, place, start=5, resize=resize, loader=decoder, m=m)), plain[5:])
    assert len(cached.bad) == 2 and cached._cache.valid.sum() == 58  # nine steps of eight: the whole training set


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_a_packed_store_fills_it_at_once(mixed, tmp_path, resize):
    catalog = load_dataset("folder", str(mixed))
    pack(catalog, tmp_path / "store", resize=resize, resize_size=18, workers=1, progress=False)
    source = PackedStore.open(tmp_path / "store").split(catalog.train)
    plain = batches(loader(mixed, "none", resize=resize, store=source))
    cached = loader(mixed, "host", resize=resize, store=source)
    passed = list(cached.fill())
    assert passed == sorted(passed) and passed[-1] == 60 and cached._cache.valid.sum() == 58
    decode, calls = cached._reader.decode_whole, []
    cached._reader.decode_whole = lambda encoded: calls.append(len(encoded)) or decode(encoded)
    assert equal(batches(cached), plain) and not calls


def test_it_fills_in_catalogue_order_and_decodes_each_picture_once(pictures):
    cached = loader(pictures, "host", stop=30)
    decode, decoded = cached._reader.decode_whole, []
    cached._reader.decode_whole = lambda encoded: decoded.append(len(encoded)) or decode(encoded)
    cached._reader.open()
    drawn, reading = set(), {}
    for step in range(4):
        drawn |= set(cached._finish(step, reading).indices.tolist())
        there = set(np.flatnonzero(cached._cache.valid).tolist())
        in_order = there - drawn
        assert drawn <= there and len(in_order) <= 8 * (step + 1)
        assert set(range(cached._next)) <= there and cached._next >= 8 * (step + 1)
    cached.close()
    batches(cached)
    assert sum(decoded) == 80 and cached._cache.valid.all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_sees_the_same_bits(pictures, place, dtype):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inputs = [StepInput(mean, std, dtype, DEVICE) for _ in range(2)]
    for plain, cached in zip(loader(pictures, "none", stop=3), loader(pictures, place, stop=3)):
        seen = []
        for given, batch in zip(inputs, (plain, cached)):
            assert given.copy_batch(batch) == (batch.step == 0)  # the buffers stay where they are
            seen.append(given.build_images())
            assert seen[-1].is_contiguous(memory_format=torch.channels_last) and torch.equal(given.labels, batch.labels)
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], normalize(plain.images, mean, std, dtype))
        assert torch.equal(seen[0].cpu(), normalize(plain.images.cpu(), mean, std, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--recipe", "paper"], ["--recipe", "unofficial", "--m", "2"]])
def test_training_ends_in_the_same_weights(pictures, tmp_path, flags):
    ends = []
    for place in ("none", "host"):
        folder = tmp_path / place
        words = [
            "train",
            "--dataset",
            "folder",
            "--data-path",
            str(pictures),
            "--output-dir",
            str(folder),
            *TINY,
            *flags,
        ]
        assert main([*words, "--max-iter", "8", "--batch-size", "16", "--cache", place, "--rank", "1"]) == 0
        ends.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_where_it_goes(pictures, monkeypatch):
    split = load_dataset("folder", str(pictures)).train
    source, config = FileSource(split.paths), InputConfig(input_size=16, resize_size=18)
    needed = 80 * 18 * 18 * 3
    gpu = torch.device("cuda:0")
    made = []
    monkeypatch.setattr(cache_budget, "ImageCache", lambda shapes, device, place: made.append(place))
    for device_room, host_room, place in ((3, 3, "device"), (2, 3, "host"), (2, 1.9, None)):
        room = {"device": device_room * needed, "host": host_room * needed}
        monkeypatch.setattr(cache_budget, "free_memory", lambda place, device, room=room: int(room[place]))
        made.clear()
        make_cache("auto", source, config, gpu)
        assert made == ([place] if place else [])
    with pytest.raises(UserError, match="--cache host: .* GiB are free: use --cache auto or none"):
        monkeypatch.setattr(cache_budget, "free_memory", lambda place, device: needed)
        make_cache("host", source, config, torch.device("cpu"))
    assert make_cache("none", source, config, gpu) is None


def test_room_is_what_the_pictures_need(mixed):
    split = load_dataset("folder", str(mixed)).train
    config = InputConfig(input_size=16, resize_size=18, resize="shorter")
    shapes = image_shapes(FileSource(split.paths), config)
    bad = [i for i, path in enumerate(split.paths) if path.endswith(("class01/3.jpg", "class04/2.jpg"))]
    assert np.flatnonzero(shapes[:, 0] == 0).tolist() == bad and (np.delete(shapes, bad, 0).min(1) == 18).all()
    cache = ImageCache(shapes, torch.device("cpu"), "host")
    assert cache.pixels.numel() == shapes.prod(1).sum() * 3 and not cache.valid.any()
    with pytest.raises(ValueError, match="has room for"):
        cache.put(0, torch.zeros(5, 5, 3, dtype=torch.uint8))


def test_a_picture_that_changes_meanwhile_is_a_bad_one(mixed):
    cached = loader(mixed, "host", resize="shorter")
    shutil.copy(mixed / "train/class00/0.jpg", mixed / "train/class00/swap.jpg")
    Image.new("RGB", (90, 20)).save(mixed / "train/class00/1.jpg")
    plain = batches(cached)
    assert len(plain) == 9 and len(cached.bad) == 3
