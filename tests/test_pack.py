"""The packed store: what is in it, when it is refused, and what it does with bad images. And `fastirt env`."""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize as torchvision_resize

import fastirt.env
import fastirt.images.pack as pack_module
from fastirt.datasets import Catalog, load_dataset
from fastirt.errors import UserError
from fastirt.images.formats.header_check import BadImage
from fastirt.images.pack import PackedStore, pack
from fastirt.images.packed_store import PROLOGUE
from fastirt.images.resize_crop import resized_size

SIZES = [(40, 61), (75, 50), (33, 33), (90, 31), (48, 48), (120, 37), (50, 50), (31, 90)]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colours with some structure, (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture()
def data(tmp_path) -> Path:
    """12 images of 3 classes in a train, a query and a gallery split."""
    root = tmp_path / "data"
    lines = ["path,label,split"]
    for i in range(12):
        split = "train" if i < 6 else "query" if i < 8 else "gallery"
        name = f"{split}/é {i}.{'png' if i == 1 else 'jpg'}"
        (root / split).mkdir(parents=True, exist_ok=True)
        image = picture(i, SIZES[i % len(SIZES)])
        if i in (2, 3):
            image = image.convert("L" if i == 2 else "CMYK")
        image.save(root / name, **({} if i == 1 else {"quality": 95}))
        lines.append(f"{name},{'abc'[i % 2 + (i > 5)]},{split}")
    (root / "split.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def catalog_of(root: Path) -> Catalog:
    return load_dataset("csv", str(root))


def made(catalog: Catalog, out: Path, **options) -> PackedStore:
    return PackedStore.open(pack(catalog, out, **{"resize": "square", "resize_size": 32, "progress": False, **options}))


def pixels(encoded: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        assert image.format == "JPEG" and image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_pictures_are_torchvisions_resize_within_the_loss_of_jpeg(data, tmp_path, resize):
    catalog = catalog_of(data)
    store = made(catalog, tmp_path / "s.pack", resize=resize, quality=100)
    assert len(store) == 12
    for split in catalog.splits():
        source = store.split(split)
        assert len(source) == len(split)
        for i in range(len(source)):
            encoded = source.read(i)
            assert encoded.dtype == np.uint8 and encoded.ndim == 1 and source.path(i) == split.paths[i]
            with Image.open(split.paths[i]) as image:
                size = (32, 32) if resize == "square" else 32
                resized = torchvision_resize(image.convert("RGB"), size, InterpolationMode.BICUBIC)
            expected = np.asarray(resized).astype(int)
            found = pixels(encoded)
            assert found.shape == expected.shape and source.size(i) == expected.shape[:2]
            assert np.abs(found - expected).mean() < 0.7  # bilinear: above 1
    assert store.header["dataset"] == "csv" and store.header["quality"] == 100 and store.header["resize"] == resize
    assert store.index["label"].tolist() == [*catalog.train.labels, *catalog.query.labels, *catalog.gallery.labels]


def test_quality_and_subsampling_reach_the_encoder(data, tmp_path):
    catalog = catalog_of(data)
    sizes = {}
    for quality, subsampling in ((95, "4:4:4"), (60, "4:4:4"), (60, "4:2:0")):
        store = made(catalog, tmp_path / "s.pack", quality=quality, subsampling=subsampling, resize_size=64)
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
    catalog = catalog_of(data)
    source = made(catalog, tmp_path / "s.pack", resize_size=48).split(catalog.train)
    assert source.read(4).tobytes() == path.read_bytes()
    assert source.read(0).tobytes() != Path(source.path(0)).read_bytes()


def test_same_bytes_for_any_number_of_workers(data, tmp_path, monkeypatch):
    catalog = catalog_of(data)
    (data / "train" / "é 0.jpg").write_bytes(b"garbage")
    monkeypatch.setattr(pack_module, "CHUNK", 3)
    files = [pack(catalog, tmp_path / f"{n}.pack", resize_size=32, workers=n, progress=n == 2) for n in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes() and len(os.listdir(tmp_path)) == 3


def test_a_worker_that_dies_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "CHUNK", 3)
    monkeypatch.setattr(pack_module, "_ignore_interrupt", functools.partial(os._exit, 1))  # run first in each worker
    with pytest.raises(UserError, match="a worker process died .* near .*é 0.jpg"):
        pack(catalog_of(data), tmp_path / "s.pack", workers=2, progress=False)
    assert os.listdir(tmp_path) == ["data"]


def test_bad_pictures_are_recorded_and_named(data, tmp_path, caplog):
    def jpeg(size=(8, 8)) -> bytes:
        out = io.BytesIO()
        picture(0, size).save(out, "JPEG")
        return out.getvalue()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    whole = jpeg((60, 60))
    scan = whole.index(b"\xff\xda") + 40
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")
    broken = {
        "é 0.jpg": b"",
        "é 1.png": b"\x89PNG\r\n\x1a\n",
        "é 2.jpg": whole[: len(whole) // 2],
        "é 3.jpg": bomb,
        "é 4.jpg": whole[:scan] + b"\xff\xd9",
    }
    catalog = catalog_of(data)
    for name, content in broken.items():
        (data / "train" / name).write_bytes(content)
    (data / "gallery" / "é 9.jpg").unlink()  # gone since the catalogue was read
    out = io.BytesIO()
    Image.new("RGB", (1, 60_000)).save(out, "JPEG")
    (data / "gallery" / "é 10.jpg").write_bytes(out.getvalue())
    store = made(catalog, tmp_path / "s.pack", resize="shorter")
    # é 4 is cut in its scan but well-formed: PIL decides, and either verdict must show in the store.
    rows = sorted(set(store.bad) - {4})
    assert rows == [0, 1, 2, 3, 9, 10] and (store.index["length"][rows] == 0).all()
    train, gallery = store.split(catalog.train), store.split(catalog.gallery)
    for source, row, reason in (
        (train, 0, "empty"),
        (train, 3, "50000"),
        (gallery, 1, "No such file"),
        (gallery, 2, "pixels"),
    ):
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


def test_check_accepts_a_moved_or_copied_data_set(data, tmp_path):
    store = made(catalog_of(data), tmp_path / "s.pack")
    store.check(catalog_of(data), "square", 32)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(data, copy, copy_function=shutil.copyfile)  # new times
    catalog = catalog_of(copy)
    store.check(catalog, "square", 32)
    assert store.split(catalog.query).path(0) == str(copy / "query" / "é 6.jpg")


def rewrite(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda d: rewrite(d / "split.csv", "é 5.jpg,b", "é 5.jpg,a"), "é 5.jpg' of class 'b' where .* class 'a'"),
        (lambda d: rewrite(d / "split.csv", ",c,", ",z,"), "class 'c' where the data set has .* class 'z'"),
        (lambda d: rewrite(d / "split.csv", "train/é 5.jpg,b,train\n", ""), "6 train, .* the data set 5 train"),
        (lambda d: rewrite(d / "split.csv", "é 8.jpg,b,gallery", "é 8.jpg,b,train"), "the data set 7 train"),
        (lambda d: picture(99, (70, 70)).save(d / "train" / "é 0.jpg"), "stale: .*é 0.jpg has .* bytes"),
    ],
)
def test_check_names_the_difference(data, tmp_path, change, expected):
    store = made(catalog_of(data), tmp_path / "s.pack")
    change(data)
    with pytest.raises(UserError, match=expected) as caught:
        store.check(catalog_of(data), "square", 32)
    assert "fastirt pack" in str(caught.value) and "\n" not in str(caught.value)


def test_check_of_options_and_edits_of_equal_size(data, tmp_path):
    catalog = catalog_of(data)
    store = made(catalog, tmp_path / "s.pack")
    for resize, size, expected in (("shorter", 32, "--resize is square"), ("square", 64, "--resize-size is 32")):
        with pytest.raises(UserError, match=expected):
            store.check(catalog, resize, size)
    with pytest.raises(UserError, match="data set is csv"):
        store.check(Catalog("folder", *list(vars(catalog).values())[1:]), "square", 32)
    path = Path(catalog.query.paths[1])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="stale: .*é 7.jpg has changed"):
        store.check(catalog, "square", 32)


def test_split_refuses_other_pictures(data, tmp_path):
    store = made(catalog_of(data), tmp_path / "s.pack")
    rewrite(data / "split.csv", "train/é 5.jpg,b,train\n", "")
    with pytest.raises(UserError, match="split train holds other images"):
        store.split(catalog_of(data).train)
    os.rename(data / "query" / "é 6.jpg", data / "query" / "other.jpg")
    rewrite(data / "split.csv", "query/é 6.jpg", "query/other.jpg")
    with pytest.raises(UserError, match="split query holds other images"):
        store.split(catalog_of(data).query)
    classes = tmp_path / "folder"
    for name in ("train/a/1.jpg", "train/c/1.jpg", *(f"test/{label}/{i}.jpg" for label in "bd" for i in range(2))):
        (classes / name).parent.mkdir(parents=True, exist_ok=True)
        picture(1, (8, 8)).save(classes / name)
    with pytest.raises(UserError, match="no split test"):
        store.split(load_dataset("folder", str(classes)).query)


def test_every_damage_is_refused(data, tmp_path):
    catalog = catalog_of(data)
    good = pack(catalog, tmp_path / "s.pack", resize_size=32, progress=False).read_bytes()
    file = tmp_path / "damaged.pack"

    def refused(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            PackedStore.open(file)
        return str(caught.value)

    assert "half-written" in refused(b"") and "half-written" in refused(bytes(PROLOGUE.size) + good[PROLOGUE.size :])
    assert "not a packed store" in refused(b"\xff\xd8" + good[2:]) and "not a packed store" in refused(b"x")
    assert "format version 9" in refused(good[:8] + b"\x09" + good[9:])
    for length in (10, PROLOGUE.size - 1, PROLOGUE.size, len(good) // 2, len(good) - 1):
        assert "truncated" in refused(good[:length])
    assert "overwritten" in refused(good + b"\0")
    assert "no.pack: cannot be read" in pytest.raises(UserError, PackedStore.open, tmp_path / "no.pack").value.args[0]
    # One flipped bit anywhere is found: at once, or when the image is read.
    positions = [*range(0, PROLOGUE.size - 4), *np.random.default_rng(0).integers(PROLOGUE.size, len(good), 400)]
    in_pictures = 0
    for position in positions:
        content = bytearray(good)
        content[position] ^= 1 << int(position) % 8
        file.write_bytes(content)
        try:
            store = PackedStore.open(file)
        except UserError:
            continue
        bad = 0
        for split in catalog.splits():
            source = store.split(split)
            for i in range(len(source)):
                try:
                    source.read(i)
                except BadImage as error:
                    assert "checksum" in error.reason and error.path == split.paths[i]
                    bad += 1
        assert bad == 1
        in_pictures += 1
    assert in_pictures > 100


def test_an_interrupted_pack_leaves_the_old_file(data, tmp_path, monkeypatch):
    catalog = catalog_of(data)
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
    root = Path(fastirt.env.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(data), str(out)], cwd=root)
    assert done.returncode == -9 and not out.exists()
    catalog = catalog_of(data)
    assert len(made(catalog, out)) == 12 and sorted(os.listdir(tmp_path)) == ["data", "s.pack"]


def test_pack_options_and_places(data, tmp_path):
    catalog = catalog_of(data)
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


def test_threads_read_at_once(data, tmp_path):
    catalog = catalog_of(data)
    source = made(catalog, tmp_path / "s.pack").split(catalog.train)
    expected = [source.read(i).tobytes() for i in range(6)]
    barrier = threading.Barrier(4)

    def work(_) -> bool:
        barrier.wait()
        return all(source.read(i % 6).tobytes() == expected[i % 6] for i in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_the_source_files_are_not_read_again(data, tmp_path):
    catalog = catalog_of(data)
    store = made(catalog, tmp_path / "s.pack")
    shutil.rmtree(data)
    assert pixels(store.split(catalog.gallery).read(3)).shape == (32, 32, 3)


def test_env_reports_and_survives_missing_and_broken_packages(monkeypatch):
    report = fastirt.env.report()
    for name in (
        "fastirt",
        "Python",
        "OS",
        "cores",
        "memory",
        "GPU",
        "torch",
        "CUDA",
        "cuDNN",
        "triton",
        "timm",
        "DALI",
        "faiss",
        "numpy",
        "apex",
    ):
        assert re.search(rf"^{name}\b.*:\s+\S", report, re.MULTILINE), name
    assert np.__version__ in report and "failed" not in report

    def nothing(*args):
        raise fastirt.env.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(fastirt.env.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fastirt.env.importlib.metadata, "version", nothing)
    monkeypatch.setattr(fastirt.env.importlib.metadata, "distributions", lambda: [])
    monkeypatch.setenv("PATH", "")
    bare = fastirt.env.report()
    assert bare.count("not installed") >= 9 and "commit" not in bare
    assert len(bare.splitlines()) == len(report.splitlines())

    def broken(name):
        raise OSError("libcudart.so.99: cannot open\nshared object")

    monkeypatch.setattr(fastirt.env.importlib.util, "find_spec", broken)
    worse = fastirt.env.report()
    assert "libcudart.so.99" in worse and len(worse.splitlines()) == len(report.splitlines())
