"""Unreadable images: refused before DALI sees them, named once, replaced by another of their class, never scored."""

import csv
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import write_images
from fastirt.config.options import Config, InputConfig
from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.images.formats.header_check import BadImage, inspect
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.train_loader import TrainLoader, train_loader

CPU = torch.device("cpu")
CONFIG = InputConfig(input_size=16, resize_size=18, num_workers=2)


def encoded(kind="JPEG", size=(40, 30), **options):
    data = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(data, kind, **options)
    return data.getvalue()


def png_with_header(width, height):
    import zlib

    data = encoded("PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def jpeg_with_size(width, height):
    data = bytearray(encoded())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def swap(data, old, new):
    assert old in data
    return data.replace(old, new, 1)


def broken_files() -> dict[str, bytes]:
    """Kinds of broken file, by name. The last few pass any check of the structure and fail in the decoder alone."""
    jpeg, png, webp, bmp = encoded(), encoded("PNG"), encoded("WEBP"), encoded("BMP")
    body = jpeg.index(b"\xff\xda") + 14
    noise = np.random.default_rng(1).integers(0, 256, 800, dtype=np.uint8).tobytes()
    return {
        "empty": b"",
        "one byte": b"\xff",
        "magic only": b"\xff\xd8\xff",
        "garbage": noise,
        "zeros": bytes(500),
        "text": b"not an image\n" * 40,
        "html": b"<!DOCTYPE html><html>404</html>",
        "header cut": jpeg[:100],
        "body cut": jpeg[: body + 200],
        "no end marker": jpeg[:-2],
        "empty scan": jpeg[:body] + b"\xff\xd9",
        "stray segment": jpeg[: body + 300] + b"\xff\xc4\x00\x20" + jpeg[body + 300 :],
        "bmp palette": bmp[:46] + b"\xff\xff\xff\x00" + bmp[50:],
        "webp flags": webp[:12] + b"VP8X\x0a\x00\x00\x00\xff" + bytes(9) + webp[12:],
        "no scan": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "no frame": jpeg[: jpeg.index(b"\xff\xc0")] + jpeg[jpeg.index(b"\xff\xc4") :],
        "no tables": swap(swap(jpeg, b"\xff\xdb", b"\xff\xfe"), b"\xff\xdb", b"\xff\xfe"),
        "garbage after magic": b"\xff\xd8" + noise,
        "zero height": jpeg_with_size(40, 0),
        "zero width": jpeg_with_size(0, 30),
        "huge": jpeg_with_size(60000, 60000),
        "12 bits": swap(jpeg, b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        "hierarchical": swap(jpeg, b"\xff\xc0", b"\xff\xc5"),
        "png cut": png[: len(png) // 2],
        "png checksum": png[:60] + b"\x00\x01" + png[62:],
        "png huge": png_with_header(50000, 50000),
        "png no data": png[:33] + png[-12:],
        "webp cut": webp[: len(webp) // 2],
        "webp header": webp[:15],
        "bmp cut": bmp[: len(bmp) // 2],
        "gif": b"GIF89a" + noise,
        "tiff": b"II*\x00" + noise,
        "segment too long": jpeg[:4] + b"\xff\xff" + jpeg[6:],
    }


def undecodable() -> bytes:
    """Whole in structure, but its coded data means nothing: only a decoder finds out."""
    import zlib

    png = encoded("PNG")
    at = png.index(b"IDAT")
    length = struct.unpack(">I", png[at - 4 : at])[0]
    chunk = b"IDAT" + bytes(length)
    return png[:at] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[at + 8 + length :]


@pytest.mark.parametrize("name", broken_files())
def test_each_kind_is_refused_before_decoding(name):
    with pytest.raises(BadImage) as error:
        inspect(broken_files()[name], "x.jpg")
    assert error.value.path == "x.jpg" and error.value.reason and "\n" not in error.value.reason


@pytest.mark.parametrize(
    "kind, options", [("JPEG", {}), ("JPEG", dict(progressive=True)), ("PNG", {}), ("WEBP", {}), ("BMP", {})]
)
def test_whole_pictures_pass_also_with_bytes_after_the_end(kind, options):
    data = encoded(kind, **options)
    assert inspect(data)[:2] == (30, 40)
    if kind == "JPEG":
        assert inspect(data + bytes(100))[:2] == (30, 40)


def test_what_only_a_decoder_finds_passes_the_check():
    assert inspect(undecodable())[:2] == (30, 40)


@pytest.fixture
def broken_set(tmp_path):
    """8 classes x 16 images, into which every kind of broken file is put."""
    write_images(tmp_path / "train", 8, 12)
    write_images(tmp_path / "test", 4, 4, seed=1)
    for number, data in enumerate([*broken_files().values(), undecodable()]):
        (tmp_path / f"train/class{number % 8:02d}/bad{number}.jpg").write_bytes(data)
    (tmp_path / "test/class00/bad.jpg").write_bytes(undecodable())
    (tmp_path / "test/class01/bad.jpg").write_bytes(b"")
    return tmp_path


LOOP = """
import sys, torch
from pathlib import Path
from fastirt.datasets import load_dataset
from fastirt.config.options import Config
from fastirt.loading.train_loader import train_loader
catalog = load_dataset("folder", sys.argv[1])
split = catalog.train
config = Config().replace(batch_size=48, m=6, max_iter=60, input_size=16, resize_size=18, num_workers=2, cache="none")
loader = train_loader(catalog, config, torch.device("cpu"), csv_path=Path(sys.argv[2]))
for batch in loader:
    assert not any(Path(split.paths[i]).name.startswith("bad") for i in batch.indices), batch.step
    assert batch.labels.tolist() == split.labels[batch.indices].tolist()
    assert len(batch.images) == 48
print(len(loader.bad), sum(Path(p).name.startswith("bad") for p in split.paths))
"""


@pytest.mark.slow
def test_all_kinds_of_broken_file_many_times_in_large_batches(broken_set, tmp_path):
    """In a process of its own: a decoder that crashes is a failure, not the end of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(broken_set), str(tmp_path / "bad.csv")],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, planted = map(int, done.stdout.split())
    assert found == planted == 34
    rows = list(csv.reader(open(tmp_path / "bad.csv")))
    assert rows[0] == ["path", "reason", "step"] and len(rows) == 35 and len({row[0] for row in rows}) == 35
    assert done.stderr.count("bad image:") == 34


def training(root, start_step=0, bad=(), csv_path=None, **options):
    """The training split, and its loader."""
    small = dict(batch_size=16, m=4, max_iter=12, input_size=16, resize_size=18, num_workers=2, cache="none")
    catalog, config = load_dataset("folder", str(root)), Config().replace(**{**small, **options})
    return catalog.train, train_loader(catalog, config, CPU, start_step=start_step, bad=bad, csv_path=csv_path)


def test_batches_are_the_same_whether_bad_pictures_are_known_or_found(broken_set):
    _, fresh = training(broken_set)
    found = [(b.indices.tolist(), b.images.clone()) for b in fresh]
    _, resumed = training(broken_set, start_step=5, bad=fresh.bad)
    again = [(b.indices.tolist(), b.images.clone()) for b in resumed]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(found[5:], again, strict=True))


def test_a_file_is_named_once_also_after_a_resumption(broken_set, tmp_path, caplog):
    for _ in range(2):
        _, loader = training(broken_set, csv_path=tmp_path / "bad.csv")
        list(loader)
    names = [row[0] for row in csv.reader(open(tmp_path / "bad.csv"))]
    assert len(names) == len(set(names)) > 10
    assert caplog.text.count("bad image:") == len(names) - 1


def test_a_class_without_pictures_leaves_the_sampler_by_name(tmp_path, caplog):
    write_images(tmp_path / "train", 6, 4)
    write_images(tmp_path / "test", 2, 2, seed=1)
    for path in (tmp_path / "train/class03").iterdir():
        path.write_bytes(b"")
    _, loader = training(tmp_path, batch_size=8, m=2, max_iter=20)
    assert all(3 not in batch.labels for batch in loader)
    assert caplog.text.count("class 3 (class03) has no readable image left") == 1


def test_without_class_names_each_emptied_class_is_named_by_its_own_folder(tmp_path, caplog):
    """Six of twelve classes are empty, so the first batch finds several at once."""
    write_images(tmp_path / "train", 12, 2)
    write_images(tmp_path / "test", 2, 2, seed=1)
    for label in range(0, 12, 2):
        for path in (tmp_path / f"train/class{label:02d}").iterdir():
            path.write_bytes(b"")
    _, named = training(tmp_path, batch_size=12, m=2)
    assert len(list(TrainLoader(named.sampler, named.images, stop_step=4))) == 4
    for label in range(0, 12, 2):
        assert caplog.text.count(f"class {label} ({tmp_path}/train/class{label:02d}) has no readable image left") == 1


def test_more_than_max_bad_stops_with_one_clear_line(broken_set, tmp_path):
    _, loader = training(broken_set, max_bad=3, csv_path=tmp_path / "bad.csv")
    with pytest.raises(UserError, match="more than 3 unreadable images; last: .*--max-bad"):
        list(loader)


@pytest.mark.parametrize("backend", ["dali", "pil"])
def test_evaluation_leaves_bad_pictures_out(broken_set, backend, caplog):
    from dataclasses import replace

    split = load_dataset("folder", str(broken_set)).query
    loader = EvalLoader(split, batch_size=8, input=replace(CONFIG, loader=backend), device=CPU)
    rows = np.concatenate([b.indices[: b.valid] for b in loader])
    assert (
        sorted(set(range(len(split))) - set(rows.tolist()))
        == sorted(loader.bad)
        == [i for i, p in enumerate(split.paths) if Path(p).name == "bad.jpg"]
    )
    assert len(rows) == len(set(rows)) == 16 and caplog.text.count("bad image:") == 2


def test_a_picture_that_disappears_is_a_bad_one(broken_set):
    split, loader = training(broken_set)
    gone = Path(split.paths[0])
    gone.unlink()
    list(loader)
    assert 0 in loader.bad


def test_a_folder_that_disappears_blames_no_picture(broken_set, tmp_path):
    split, loader = training(broken_set)
    root = Path(split.paths[0]).parent.parent
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{root.name}: the folder of the images is gone .*--resume"):
        list(loader)
    assert not loader.bad
