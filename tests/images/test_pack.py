"""`pack`: the content of a store, equal bytes for any number of workers, interruptions."""

from __future__ import annotations

import functools
import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize as torchvision_resize

from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.images import pack as pack_module
from fastirt.images.formats.header_check import BadImage
from fastirt.images.pack import PackedStore, pack
from fastirt.images.resize_crop import resized_size
from tests.helpers import run_python
from tests.images.image_files import encode, png_chunk, smooth, store_of


def pixels(encoded: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        assert image.format == "JPEG" and image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_images_are_torchvisions_resize_within_the_loss_of_jpeg(data, tmp_path, resize):
    catalog = load_dataset("csv", str(data))
    store = store_of(catalog, tmp_path / "s.pack", resize=resize, quality=100)
    assert len(store) == 12
    for split in catalog.splits():
        source = store.split(split)
        assert len(source) == len(split)
        for i in range(len(source)):
            encoded = source.read(i)
            assert encoded.dtype == np.uint8
            assert encoded.ndim == 1
            assert source.path(i) == split.paths[i]
            with Image.open(split.paths[i]) as image:
                size = (32, 32) if resize == "square" else 32
                resized = torchvision_resize(image.convert("RGB"), size, InterpolationMode.BICUBIC)
            expected = np.asarray(resized).astype(int)
            found = pixels(encoded)
            assert found.shape == expected.shape and source.size(i) == expected.shape[:2]
            assert np.abs(found - expected).mean() < 0.7  # bilinear: above 1
    assert store.header["dataset"] == "csv"
    assert store.header["quality"] == 100
    assert store.header["resize"] == resize
    assert store.index["label"].tolist() == [*catalog.train.labels, *catalog.query.labels, *catalog.gallery.labels]


def test_quality_and_subsampling_reach_the_encoder(data, tmp_path):
    catalog = load_dataset("csv", str(data))
    sizes = {}
    for quality, subsampling in ((95, "4:4:4"), (60, "4:4:4"), (60, "4:2:0")):
        store = store_of(catalog, tmp_path / "s.pack", quality=quality, subsampling=subsampling, resize_size=64)
        sizes[quality, subsampling] = int(store.index["length"].sum())
    assert sizes[95, "4:4:4"] > sizes[60, "4:4:4"] > sizes[60, "4:2:0"]


def test_resized_size_is_torchvisions():
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (256, 256), (1, 90), *rng.integers(1, 700, (300, 2)).tolist()]:
        expected = torchvision_resize(Image.new("1", (width, height)), 50, InterpolationMode.NEAREST).size[::-1]
        assert resized_size(height, width, "shorter", 50) == expected
    assert resized_size(10, 900, "square", 50) == (50, 50)


def test_a_jpeg_of_the_right_size_is_kept_without_loss(data, tmp_path):
    path = data / "train" / "é 4.jpg"
    with Image.open(path) as image:
        assert image.size == (48, 48)
    catalog = load_dataset("csv", str(data))
    source = store_of(catalog, tmp_path / "s.pack", resize_size=48).split(catalog.train)
    assert source.read(4).tobytes() == path.read_bytes()
    assert source.read(0).tobytes() != Path(source.path(0)).read_bytes()


def test_same_bytes_for_any_number_of_workers(data, tmp_path, monkeypatch):
    catalog = load_dataset("csv", str(data))
    (data / "train" / "é 0.jpg").write_bytes(b"garbage")
    monkeypatch.setattr(pack_module, "CHUNK", 3)
    files = [pack(catalog, tmp_path / f"{n}.pack", resize_size=32, workers=n, progress=n == 2) for n in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(os.listdir(tmp_path)) == 3


def test_a_worker_that_dies_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "CHUNK", 3)
    # run first in each worker
    monkeypatch.setattr(pack_module, "_ignore_interrupt", functools.partial(os._exit, 1))
    with pytest.raises(UserError, match="worker process died .*é 0.jpg"):
        pack(load_dataset("csv", str(data)), tmp_path / "s.pack", workers=2, progress=False)
    assert os.listdir(tmp_path) == ["data"]


def test_bad_images_are_recorded_and_named(data, tmp_path, caplog):
    whole = encode(smooth(0, (60, 60)), "JPEG")
    scan = whole.index(b"\xff\xda") + 40
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    bomb += png_chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + png_chunk(b"IEND", b"")
    broken = {
        "é 0.jpg": b"",
        "é 1.png": b"\x89PNG\r\n\x1a\n",
        "é 2.jpg": whole[: len(whole) // 2],
        "é 3.jpg": bomb,
        "é 4.jpg": whole[:scan] + b"\xff\xd9",
    }
    catalog = load_dataset("csv", str(data))
    for name, content in broken.items():
        (data / "train" / name).write_bytes(content)
    (data / "gallery" / "é 9.jpg").unlink()  # gone since the catalogue was read
    (data / "gallery" / "é 10.jpg").write_bytes(encode(Image.new("RGB", (1, 60_000)), "JPEG"))
    store = store_of(catalog, tmp_path / "s.pack", resize="shorter")
    # é 4 is cut in its scan but well-formed: PIL decides, and its verdict must show in the store.
    rows = sorted(set(store.bad) - {4})
    assert rows == [0, 1, 2, 3, 9, 10]
    assert (store.index["length"][rows] == 0).all()
    train, gallery = store.split(catalog.train), store.split(catalog.gallery)
    reasons = [(train, 0, "empty"), (train, 3, "50000"), (gallery, 1, "No such file"), (gallery, 2, "pixels")]
    for source, row, reason in reasons:
        with pytest.raises(BadImage, match=reason) as caught:
            source.read(row)
        assert caught.value.path == source.path(row) and source.size(row) == (0, 0)
        assert source.path(row) in caplog.text
    assert len(train.read(5)) and len(store.split(catalog.query).read(0))
    for path in catalog.train.paths + catalog.query.paths + catalog.gallery.paths:
        Path(path).write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 12 images"):
        pack(catalog, tmp_path / "t.pack", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["data", "s.pack"]


def test_an_interrupted_pack_leaves_the_old_file(data, tmp_path, monkeypatch):
    catalog = load_dataset("csv", str(data))
    out = pack(catalog, tmp_path / "s.pack", resize_size=32, progress=False)
    before = out.read_bytes()
    encode, seen = pack_module.encode_image, []

    def interrupted(path, recipe):
        seen.append(PackedStore.open(out))
        if len(seen) == 5:
            unfinished = tmp_path / "s.pack.partial"
            assert unfinished.exists()
            with pytest.raises(UserError, match="another process"):
                pack(catalog, out, resize_size=32, progress=False)
            shutil.copy(unfinished, tmp_path / "copy")
            raise KeyboardInterrupt
        return encode(path, recipe)

    monkeypatch.setattr(pack_module, "encode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(catalog, out, resize_size=16, progress=False)
    assert out.read_bytes() == before and not (tmp_path / "s.pack.partial").exists()
    with pytest.raises(UserError, match="half-written"):
        PackedStore.open(tmp_path / "copy")


def test_kill_minus_nine_in_the_middle_and_again(data, tmp_path):
    script = """
import os, sys
import fastirt.images.pack as p
from fastirt.datasets import load_dataset
encode, seen = p.encode_image, []
def die(*job):
    seen.append(job)
    if len(seen) == 7:
        os.kill(os.getpid(), 9)
    return encode(*job)
p.encode_image = die
p.pack(load_dataset("csv", sys.argv[1]), sys.argv[2], progress=False)
"""
    out = tmp_path / "s.pack"
    assert run_python(script, data, out).returncode == -9
    assert not out.exists()
    catalog = load_dataset("csv", str(data))
    assert len(store_of(catalog, out)) == 12
    assert sorted(os.listdir(tmp_path)) == ["data", "s.pack"]


def test_options_that_cannot_be_and_places_that_cannot_be_written_are_refused(data, tmp_path):
    catalog = load_dataset("csv", str(data))
    for options, expected in (
        ({"resize": "longer"}, "--resize longer"),
        ({"resize_size": 0}, "--resize-size 0"),
        ({"quality": 101}, "--quality 101"),
        ({"subsampling": "4:1:1"}, "--subsampling 4:1:1"),
    ):
        with pytest.raises(UserError, match=expected):
            pack(catalog, tmp_path / "s.pack", **options)
    with pytest.raises(UserError, match="is a folder"):
        pack(catalog, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        pack(catalog, data / "split.csv" / "s.pack")
    assert pack(catalog, tmp_path / "new" / "folder" / "s.pack", resize_size=8, progress=False).exists()
