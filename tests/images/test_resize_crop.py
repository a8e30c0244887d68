"""Decoding, resize and crop: against torchvision, and every decoder against Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tvf

from fastirt.config.options import InputConfig
from fastirt.images.decoders.choose import make_decoder
from fastirt.images.decoders.dali import DaliDecoder
from fastirt.images.decoders.torchvision import resize
from fastirt.images.normalize import normalize
from fastirt.images.resize_crop import crop_corners, crop_offset, resized_size, resized_sizes
from fastirt.loading.augment import draw_crops
from tests.helpers import CPU
from tests.images.image_files import encode, photo

SIZES = [(300, 400), (401, 299), (64, 64), (48, 200), (333, 91), (56, 57), (1, 1), (3, 500), (700, 10), (1000, 800)]


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> np.ndarray:
    return np.frombuffer(encode(image, kind, **options), np.uint8)


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
@pytest.mark.parametrize("loader, mean, largest", [("pil", 0.03, 2), ("torchvision", 0.06, 2), ("dali", 0.35, 12)])
def test_geometry_equals_torchvision(resize, training, loader, mean, largest):
    """Mean and largest difference in levels of 255. DALI rounds once where the others round after
    each direction; Pillow 13 begins with the columns of the tall images, torch with rows always."""
    config = InputConfig(input_size=56, resize_size=64, resize=resize)
    images = [photo(h, w, seed=seed) for seed, (h, w) in enumerate(SIZES)]
    files = [encoded(image, "PNG") for image in images]
    crops = draw_crops(0, 1, len(images))
    x, y, flip = (crops.x, crops.y, crops.flip) if training else (None, None, np.zeros(len(images), bool))
    resized = resized_sizes(SIZES, config)
    corners = crop_corners(resized, 56, x, y)
    decoder = make_decoder(loader, config, len(images), 2, CPU)
    ours = decoder.decode(files, np.array(SIZES), resized, corners, flip).numpy().astype(int)
    whole = [image.numpy() for image in decoder.decode_whole(files, np.array(SIZES), resized)]
    decoder.close()
    places = [(x[i], y[i], flip[i]) if training else () for i in range(len(images))]
    theirs = np.stack([by_torchvision(image, config, *place) for image, place in zip(images, places)]).astype(int)
    difference = np.abs(ours - theirs)
    assert difference.mean() < mean and difference.max() <= largest
    # every view is a crop of the same pixels, bit for bit
    for i, (top, left) in enumerate(corners):
        crop = whole[i][top : top + 56, left : left + 56]
        assert whole[i].shape[:2] == tuple(resized[i])
        assert np.array_equal(crop[:, ::-1] if flip[i] else crop, ours[i])


def test_sizes_and_offsets_are_torchvision_s():
    for height, width in [(375, 500), (500, 375), (333, 1000), (256, 257), (1, 3)]:
        with_pil = transforms.Resize(256)(Image.new("RGB", (width, height)))
        assert resized_size(height, width, "shorter", 256) == (with_pil.height, with_pil.width)
    for resized in range(56, 70):
        assert crop_offset(resized, 56, None) == int(round((resized - 56) / 2.0))
        assert [crop_offset(resized, 56, u) for u in (0.0, 0.999999)] == [0, resized - 56]


def decoded_twice(file, loader, size, height, width):
    """By a decoder and by Pillow's: the top left corner, resized to (height, width)."""
    place = *[np.array([[height, width]])] * 2, np.zeros((1, 2), int), np.zeros(1, bool)
    config = InputConfig(input_size=size)
    return (make_decoder(name, config, 1, 1, CPU).decode([file], *place) for name in (loader, "pil"))


def test_resizing_no_more_than_a_crop_needs_changes_no_bit():
    """Of any size, up and down, in both directions."""
    rng, cut = np.random.default_rng(0), 0
    for number in range(300):
        height, width = (int(2 ** rng.uniform(0, 8)) for _ in range(2))
        side = int(rng.integers(8, 150))
        size = resized_size(height, width, ("square", "shorter")[number % 2], side)
        if max(size) > 2000:
            continue
        crop = int(rng.integers(1, side + 1))
        top, left = (int(rng.integers(0, whole - crop + 1)) for whole in size)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        whole = resize(image, size, size)
        assert whole.shape == (*size, 3) and whole.flags.c_contiguous
        part = resize(image, size, (top + crop, left + crop))
        cut += part.size < whole.size
        place = slice(top, top + crop), slice(left, left + crop)
        assert np.array_equal(part[place], whole[place]), (height, width, size, crop, top, left)
    assert cut > 100


def test_leaving_out_a_resize_that_changes_nothing_changes_nothing():
    """A batch that has its size already, as a packed store's, against the same images beside one
    that has not."""
    files = [encoded(photo(64, 64 + 9 * i, seed=i), "PNG") for i in range(3)]
    sizes = np.array([[64, 64 + 9 * i] for i in range(3)])
    decoder = DaliDecoder(56, 4, 2, CPU)
    alone = decoder.decode_whole(files, sizes, sizes)
    other = encoded(photo(90, 80, seed=9), "PNG")
    mixed = decoder.decode_whole([*files, other], np.array([*sizes, [90, 80]]), np.array([*sizes, [72, 64]]))
    assert len(decoder._pipelines) == 2 and mixed[3].shape == (72, 64, 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed))


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
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
def test_every_kind_is_decoded_as_by_pillow(kind, mode, options, loader):
    file = encoded(photo(60, 60, mode, seed=3), kind, **options)
    ours, plain = decoded_twice(file, loader, 60, 60, 60)
    allowed = 0 if loader == "torchvision" else 3 if mode == "CMYK" or kind == "WEBP" else 1
    assert (ours.int() - plain.int()).abs().max() <= allowed


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_exif_orientation_is_ignored_as_pil_ignores_it(loader):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(photo(40, 60), exif=exif)
    ours, plain = decoded_twice(file, loader, 40, 40, 60)
    assert (ours.int() - plain.int()).abs().float().mean() < 1


def test_normalisation_is_torchvisions_in_channels_last():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = normalize(images, mean, std)
    expected = transforms.Normalize(mean, std)(images.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.data_ptr() != images.data_ptr()
    assert normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16
