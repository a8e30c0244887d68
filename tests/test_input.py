"""Images to batches: geometry against torchvision, DALI against its plain twin, sharding, resume, packed stores."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tvf

from fastirt.config.options import InputConfig
from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.images.decode_dali import DaliDecoder
from fastirt.images.decode_pil import PilDecoder
from fastirt.images.normalize import normalize
from fastirt.images.pack import PackedStore, pack
from fastirt.images.resize_crop import check_input, crop_corners, crop_offset, resized_size, resized_sizes
from fastirt.loading.augment import draw_crops
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.train_loader import TrainLoader

CPU = torch.device("cpu")
SIZES = [(300, 400), (401, 299), (64, 64), (48, 200), (333, 91), (56, 57), (1, 1), (3, 500), (700, 10), (1000, 800)]


def photo(height, width, seed=0, mode="RGB"):
    """Smooth structure with noise, as a photograph has."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.clip(np.asarray(rough) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, kind="JPEG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return np.frombuffer(data.getvalue(), np.uint8)


def by_torchvision(image, config, x=None, y=None, flip=False):
    """Resize, crop and flip as the public re-implementation's transforms do, at a given place."""
    side, size = config.resize_size, config.input_size
    target = (side, side) if config.resize == "square" else side
    image = transforms.Resize(target, transforms.InterpolationMode.BICUBIC)(image.convert("RGB"))
    if x is None:
        image = transforms.CenterCrop(size)(image)
    else:
        image = tvf.crop(image, int(y * (image.height - size + 1)), int(x * (image.width - size + 1)), size, size)
    return np.asarray(tvf.hflip(image) if flip else image)


@pytest.mark.parametrize("resize", ["square", "shorter"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loader, mean, largest", [("pil", 0.03, 2), ("dali", 0.35, 12)])
def test_geometry_equals_torchvision(resize, training, loader, mean, largest):
    """Mean and largest difference in levels of 255. DALI rounds once where PIL rounds after each direction."""
    config = InputConfig(input_size=56, resize_size=64, resize=resize)
    images = [photo(h, w, seed) for seed, (h, w) in enumerate(SIZES)]
    encoded = [encode(image, "PNG") for image in images]
    crops = draw_crops(0, 1, len(images))
    x, y, flip = (crops.x, crops.y, crops.flip) if training else (None, None, np.zeros(len(images), bool))
    resized = resized_sizes(SIZES, config)
    corners = crop_corners(resized, 56, x, y)
    decoder = PilDecoder(56, 2) if loader == "pil" else DaliDecoder(56, len(images), 2, CPU)
    ours = decoder.decode(encoded, np.array(SIZES), resized, corners, flip).numpy().astype(int)
    whole = [picture.numpy() for picture in decoder.decode_whole(encoded, np.array(SIZES), resized)]
    decoder.close()
    theirs = np.stack(
        [by_torchvision(image, config, *((x[i], y[i], flip[i]) if training else ())) for i, image in enumerate(images)]
    ).astype(int)
    difference = np.abs(ours - theirs)
    assert difference.mean() < mean and difference.max() <= largest
    for i, (top, left) in enumerate(corners):  # every view is a crop of the same pixels, bit for bit
        crop = whole[i][top : top + 56, left : left + 56]
        assert whole[i].shape[:2] == tuple(resized[i]) and np.array_equal(crop[:, ::-1] if flip[i] else crop, ours[i])


def test_sizes_and_offsets_are_torchvision_s():
    for height, width in [(375, 500), (500, 375), (333, 1000), (256, 257), (1, 3)]:
        with_pil = transforms.Resize(256)(Image.new("RGB", (width, height)))
        assert resized_size(height, width, "shorter", 256) == (with_pil.height, with_pil.width)
    for resized in range(56, 70):
        assert crop_offset(resized, 56, None) == int(round((resized - 56) / 2.0))
        assert [crop_offset(resized, 56, u) for u in (0.0, 0.999999)] == [0, resized - 56]


def decoded_twice(encoded, size, height, width):
    """By DALI and by PIL: the top left corner, resized to (height, width)."""
    place = *[np.array([[height, width]])] * 2, np.zeros((1, 2), int), np.zeros(1, bool)
    return DaliDecoder(size, 1, 1, CPU).decode([encoded], *place), PilDecoder(size, 1).decode([encoded], *place)


def test_leaving_out_a_resize_that_changes_nothing_changes_nothing():
    """A batch that has its size already, as a packed store's, against the same images beside one that has not."""
    encoded = [encode(photo(64, 64 + 9 * i, i), "PNG") for i in range(3)]
    sizes = np.array([[64, 64 + 9 * i] for i in range(3)])
    decoder = DaliDecoder(56, 4, 2, CPU)
    alone = decoder.decode_whole(encoded, sizes, sizes)
    other = encode(photo(90, 80, 9), "PNG")
    mixed = decoder.decode_whole([*encoded, other], np.array([*sizes, [90, 80]]), np.array([*sizes, [72, 64]]))
    assert len(decoder._pipelines) == 2 and mixed[3].shape == (72, 64, 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed))


@pytest.mark.parametrize(
    "kind, mode, options",
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "L", {}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_dali_decodes_every_kind_as_pil_does(kind, mode, options):
    encoded = encode(photo(60, 60, 3, mode), kind, **options)
    ours, plain = decoded_twice(encoded, 60, 60, 60)
    assert (ours.int() - plain.int()).abs().max() <= (3 if mode == "CMYK" or kind == "WEBP" else 1)


def test_exif_orientation_is_ignored_as_pil_ignores_it():
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(photo(40, 60), exif=exif)
    ours, plain = decoded_twice(encoded, 40, 40, 60)
    assert (ours.int() - plain.int()).abs().float().mean() < 1


def loaded(pictures, start=0, stop=5, **changes):
    catalog = load_dataset("folder", str(pictures))
    options = {**dict(num_workers=2, loader="dali"), **changes}
    config = InputConfig(input_size=16, resize_size=18, **options)
    loader = TrainLoader(
        catalog.train, batch_size=32, m=4, seed=7, input=config, device=CPU, start_step=start, stop_step=stop
    )
    batches = [(b.step, b.indices.tolist(), b.labels.tolist(), b.images.clone()) for b in loader]
    loader.close()
    assert all(np.array_equal(labels, catalog.train.labels[rows]) for _, rows, labels, _ in batches)
    return batches


def same(a, b):
    return len(a) == len(b) and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b))


def test_batches_do_not_depend_on_threads_or_on_where_the_run_began(pictures):
    whole = loaded(pictures)
    assert (
        [b[0] for b in whole] == [0, 1, 2, 3, 4]
        and whole[0][3].shape == (32, 16, 16, 3)
        and whole[0][3].dtype == torch.uint8
    )
    assert same(whole, loaded(pictures, num_workers=1))
    assert same(whole[3:], loaded(pictures, start=3))


def test_the_pil_twin_gives_the_same_batches(pictures):
    for ours, plain in zip(loaded(pictures), loaded(pictures, loader="pil")):
        assert ours[:3] == plain[:3]
        assert (ours[3].int() - plain[3].int()).abs().float().mean() < 0.5


def test_images_survive_later_batches(pictures):
    catalog = load_dataset("folder", str(pictures))
    config = InputConfig(input_size=16, resize_size=18, num_workers=2)
    loader = TrainLoader(catalog.train, batch_size=32, m=0, seed=0, input=config, device=CPU, stop_step=6)
    kept = [(batch.images, batch.images.clone()) for batch in loader]
    assert all(torch.equal(now, then) for now, then in kept)


def test_evaluation_is_in_order_with_a_padded_last_batch(pictures):
    catalog = load_dataset("folder", str(pictures))
    config = InputConfig(input_size=16, resize_size=18, num_workers=2)
    batches = list(EvalLoader(catalog.query, batch_size=5, input=config, device=CPU))
    assert [b.valid for b in batches] == [5, 5, 5, 5, 4]
    assert all(b.images.shape == (5, 16, 16, 3) for b in batches)
    assert np.concatenate([b.indices[: b.valid] for b in batches]).tolist() == list(range(24))
    assert (batches[-1].labels[4:] == -1).all()


@pytest.mark.parametrize("batch_size", [1, 5, 7, 10, 23, 24, 25, 128])
def test_evaluation_takes_the_smallest_batches_of_their_number(pictures, batch_size):
    """24 images: no more batches than with full ones, and less than one image of padding a batch."""
    catalog = load_dataset("folder", str(pictures))
    config = InputConfig(input_size=16, resize_size=18, num_workers=2)
    loader = EvalLoader(catalog.query, batch_size=batch_size, input=config, device=CPU)
    batches = list(loader)
    assert len(loader) == len(batches) == -(-24 // batch_size)
    assert len({len(b) for b in batches}) == 1
    assert len(batches[0]) <= batch_size
    assert sum(len(b) - b.valid for b in batches) < len(batches)
    assert np.concatenate([b.indices[: b.valid] for b in batches]).tolist() == list(range(24))


def test_a_batch_size_of_zero_is_one_clear_line(pictures):
    config = InputConfig(input_size=16, resize_size=18)
    with pytest.raises(UserError, match="--eval-batch-size 0"):
        EvalLoader(load_dataset("folder", str(pictures)).query, batch_size=0, input=config, device=CPU)


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_a_packed_store_gives_the_batches_of_the_files(pictures, tmp_path, resize):
    catalog = load_dataset("folder", str(pictures))
    config = InputConfig(input_size=16, resize_size=18, resize=resize, num_workers=2)
    pack(catalog, tmp_path / "store", resize=resize, resize_size=18, quality=100, workers=1, progress=False)
    store = PackedStore.open(tmp_path / "store")
    loaders = [
        TrainLoader(catalog.train, batch_size=16, m=2, seed=0, input=config, device=CPU, stop_step=2, store=source)
        for source in (None, store.split(catalog.train))
    ]
    for files, packed in zip(*loaders):
        assert np.array_equal(files.indices, packed.indices)
        assert (files.images.int() - packed.images.int()).abs().float().mean() < 1.5


def test_normalise():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = normalize(images, mean, std)
    expected = transforms.Normalize(mean, std)(images.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.data_ptr() != images.data_ptr()
    assert normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_leaving_the_loop_and_errors_stop_the_background_thread(pictures):
    import threading

    catalog = load_dataset("folder", str(pictures))
    config = InputConfig(input_size=16, resize_size=18, num_workers=2)
    before = threading.active_count()
    loader = TrainLoader(catalog.train, batch_size=8, m=0, seed=0, input=config, device=CPU)
    for batch in loader:
        if batch.step == 2:
            break
    loader.close()
    assert threading.active_count() <= before + 1
    with pytest.raises(UserError, match="--resize-size 10"):
        check_input(InputConfig(input_size=16, resize_size=10))


ABANDONED = """
import sys, torch
from fastirt.datasets import load_dataset
from fastirt.config.options import InputConfig
from fastirt.loading.train_loader import TrainLoader
loader = TrainLoader(load_dataset("folder", sys.argv[1]).train, batch_size=8, m=0, seed=0, device=torch.device("cpu"),
                     input=InputConfig(input_size=16, resize_size=18, num_workers=2))
for batch in loader:
    raise KeyError("the consumer's own")
"""


@pytest.mark.slow
def test_a_process_that_dies_with_a_loader_open_ends_cleanly(pictures):
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(pictures)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
    )
    assert (
        done.returncode == 1 and done.stderr.strip().endswith("the consumer's own\"") and "ignored" not in done.stderr
    )
