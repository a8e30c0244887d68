"""The decoded cache: the same batches as without it, each image decoded once, within its memory."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.images.normalize import byte_table, normalize
from fastirt.images.pack import PackedStore, pack
from fastirt.images.source import FileSource
from fastirt.kernels.gather import gather_views
from fastirt.loading import cache_budget
from fastirt.loading.cache_budget import image_shapes, make_cache
from fastirt.loading.image_cache import ImageCache
from fastirt.step.step_input import StepInput
from tests.helpers import (
    CPU,
    DECODER,
    assert_same_weights,
    needs_dali,
    tiny_input,
    tiny_loader,
    train_tiny,
    write_splits,
)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
PLACES = ["host", "device"] if DEVICE.type == "cuda" else ["host"]


@pytest.fixture
def mixed(tmp_path):
    """10 classes x 6 images of many shapes, two of them unreadable."""
    root = write_splits(tmp_path / "mixed", (10, 6), (2, 2))
    rng = np.random.default_rng(0)
    for path in sorted((root / "train").rglob("*.jpg"))[::3]:
        height, width = rng.integers(17, 70, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    (root / "train/class01/3.jpg").write_bytes(b"not an image")
    whole = (root / "train/class04/2.jpg").read_bytes()
    (root / "train/class04/2.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def loader(folder, place, stop=9, start=0, m=2, store=None, **changes):
    options = dict(batch_size=8, m=m, seed=3, max_iter=stop, cache=place, loader=DECODER)
    return tiny_loader(load_dataset("folder", str(folder)), DEVICE, store, start, **{**options, **changes})


def batches(loader):
    found = [(b.step, b.indices.tolist(), b.labels.tolist(), b.images.clone()) for b in loader]
    loader.close()
    return found


def equal(a, b):
    return len(a) == len(b) > 0 and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("resize", ["square", "shorter"])
@pytest.mark.parametrize(
    "decoder, m",
    [
        pytest.param("dali", 2, marks=needs_dali),
        pytest.param("dali", 0, marks=needs_dali),
        ("pil", 2),
        ("torchvision", 2),
    ],
)
def test_batches_are_those_without_it(mixed, place, resize, decoder, m):
    """Bit for bit, bad images and all, and wherever the run begins."""
    uncached = loader(mixed, "none", resize=resize, loader=decoder, m=m)
    plain = batches(uncached)
    # on a GPU further images are decoded beside those of the batch
    lazy, cached = (loader(mixed, place, resize=resize, loader=decoder, m=m) for _ in range(2))
    lazy.images.ahead, cached.images.ahead = 0, 8
    assert equal(batches(lazy), plain) and equal(batches(cached), plain)
    assert equal(batches(loader(mixed, place, start=5, resize=resize, loader=decoder, m=m)), plain[5:])
    # nine steps of eight: the whole training set
    assert len(cached.bad) == 2 and cached.images.cache.valid.sum() == 58
    assert lazy.bad == uncached.bad


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_a_packed_store_fills_it_at_once(mixed, tmp_path, resize):
    catalog = load_dataset("folder", str(mixed))
    pack(catalog, tmp_path / "store", resize=resize, resize_size=18, workers=1, progress=False)
    source = PackedStore.open(tmp_path / "store").split(catalog.train)
    plain = batches(loader(mixed, "none", resize=resize, store=source))
    cached = loader(mixed, "host", resize=resize, store=source)
    passed = list(cached.images.fill(step=0))
    assert passed == sorted(passed)
    assert passed[-1] == 60
    assert cached.images.cache.valid.sum() == 58
    decoded = decodes(cached.images)
    assert equal(batches(cached), plain) and not decoded


def decodes(images):
    """A list that receives the number of images of each call of the decoder."""
    decode, decoded = images.decoder.decode_whole, []
    images.decoder.decode_whole = lambda encoded: decoded.append(len(encoded)) or decode(encoded)
    return decoded


def test_on_a_cpu_each_image_is_decoded_once_when_a_batch_needs_it(image_folder):
    cached = tiny_loader(load_dataset("folder", str(image_folder)), CPU, batch_size=8, max_iter=30, cache="host")
    decoded, drawn = decodes(cached.images), set()
    cached.images.open()
    for _, batch in zip(range(4), cached.batches()):
        drawn |= set(batch.indices.tolist())
        assert set(np.flatnonzero(cached.images.cache.valid).tolist()) == drawn
    cached.close()
    batches(cached)
    assert sum(decoded) == cached.images.cache.valid.sum() == 80


def test_it_fills_in_catalogue_order_and_decodes_each_image_once(image_folder):
    cached = loader(image_folder, "host", stop=30)
    cached.images.ahead = 8  # as on a GPU
    decoded = decodes(cached.images)
    cached.images.open()
    drawn = set()
    for step, batch in zip(range(4), cached.batches()):
        drawn |= set(batch.indices.tolist())
        there = set(np.flatnonzero(cached.images.cache.valid).tolist())
        in_order = there - drawn
        assert drawn <= there and len(in_order) <= 8 * (step + 1)
        assert set(range(8 * (step + 1))) <= there
    cached.close()
    batches(cached)
    assert sum(decoded) == 80 and cached.images.cache.valid.all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_sees_the_same_bits(image_folder, place, dtype):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inputs = [StepInput(mean, std, dtype, DEVICE) for _ in range(2)]
    for plain, cached in zip(loader(image_folder, "none", stop=3), loader(image_folder, place, stop=3)):
        seen = []
        for given, batch in zip(inputs, (plain, cached)):
            assert given.copy_batch(batch) == (batch.step == 0)  # the buffers stay where they are
            seen.append(given.build_images())
            assert seen[-1].is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(given.labels, batch.labels)
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], normalize(plain.images, mean, std, dtype))
        assert torch.equal(seen[0].cpu(), normalize(plain.images.cpu(), mean, std, dtype))


@pytest.mark.parametrize("place", ["none", "host"])
def test_a_fixed_buffer_shows_each_batch_that_is_copied_into_it(image_folder, place):
    """As a step on a GPU takes batches: only `per_batch` is copied."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    loaded, buffer = loader(image_folder, place, stop=3), None
    table = byte_table(mean, std, torch.float32, DEVICE)
    for batch in loaded:
        buffer = buffer or batch.views.with_new_buffer()
        buffer.per_batch.copy_(batch.views.per_batch)
        pixels = torch.empty(*batch.images.shape, device=DEVICE)
        gather_views(pixels, buffer.pixels, buffer.starts, buffer.widths, buffer.picks, table)
        assert torch.equal(pixels, batch.views.fill(torch.empty_like(pixels), table))
        assert buffer.per_batch.data_ptr() != batch.views.per_batch.data_ptr()
    loaded.close()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--recipe paper".split(), "--recipe unofficial --m 2".split()])
def test_training_ends_in_the_same_weights(image_folder, tmp_path, flags):
    few = [*flags, *"--max-iter 8 --batch-size 16 --rank 1".split()]
    for place in ("none", "host"):
        assert train_tiny(image_folder, tmp_path / place, *few, "--cache", place) == 0
    assert_same_weights(tmp_path / "host", tmp_path / "none")


def test_auto_puts_it_on_the_device_then_the_host_then_nowhere(image_folder, monkeypatch):
    split = load_dataset("folder", str(image_folder)).train
    source, config = FileSource(split.paths), tiny_input()
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
    with pytest.raises(UserError, match="--cache host: .* GiB"):
        monkeypatch.setattr(cache_budget, "free_memory", lambda place, device: needed)
        make_cache("host", source, config, CPU)
    assert make_cache("none", source, config, gpu) is None


def test_room_is_what_the_images_need(mixed):
    split = load_dataset("folder", str(mixed)).train
    config = tiny_input(resize="shorter")
    shapes = image_shapes(FileSource(split.paths), config)
    bad = [i for i, path in enumerate(split.paths) if path.endswith(("class01/3.jpg", "class04/2.jpg"))]
    assert np.flatnonzero(shapes[:, 0] == 0).tolist() == bad
    assert (np.delete(shapes, bad, 0).min(1) == 18).all()
    cache = ImageCache(shapes, CPU, "host")
    assert cache.pixels.numel() == shapes.prod(1).sum() * 3 and not cache.valid.any()
    assert cache.pixels.untyped_storage().nbytes() == -(-cache.pixels.numel() // 4) * 4  # whole words
    with pytest.raises(ValueError, match="has room for"):
        cache.put(0, torch.zeros(5, 5, 3, dtype=torch.uint8))


def test_an_image_that_changes_meanwhile_is_a_bad_one(mixed):
    cached = loader(mixed, "host", resize="shorter")
    cached.images.ahead = 8
    shutil.copy(mixed / "train/class00/0.jpg", mixed / "train/class00/swap.jpg")
    Image.new("RGB", (90, 20)).save(mixed / "train/class00/1.jpg")
    plain = batches(cached)
    assert len(plain) == 9 and len(cached.bad) == 3
