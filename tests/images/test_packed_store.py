"""An open packed store: its data sets and options, damage, and reading threads."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastirt.datasets import Catalog, load_dataset
from fastirt.errors import UserError
from fastirt.images.formats.header_check import BadImage
from fastirt.images.pack import PackedStore, pack
from fastirt.images.packed_format import PROLOGUE
from tests.images.image_files import by_pillow, smooth, store_of


def test_check_accepts_a_moved_or_copied_data_set(data, tmp_path):
    store = store_of(load_dataset("csv", str(data)), tmp_path / "s.pack")
    store.check(load_dataset("csv", str(data)), "square", 32)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(data, copy, copy_function=shutil.copyfile)  # new times
    catalog = load_dataset("csv", str(copy))
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
        (lambda d: smooth(99, (70, 70)).save(d / "train" / "é 0.jpg"), "stale: .*é 0.jpg has .* bytes"),
    ],
)
def test_check_names_the_difference(data, tmp_path, change, expected):
    store = store_of(load_dataset("csv", str(data)), tmp_path / "s.pack")
    change(data)
    with pytest.raises(UserError, match=expected) as caught:
        store.check(load_dataset("csv", str(data)), "square", 32)
    assert "fastirt pack" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_of_options_and_edits_of_equal_size(data, tmp_path):
    catalog = load_dataset("csv", str(data))
    store = store_of(catalog, tmp_path / "s.pack")
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


def test_split_refuses_other_images(data, tmp_path):
    store = store_of(load_dataset("csv", str(data)), tmp_path / "s.pack")
    rewrite(data / "split.csv", "train/é 5.jpg,b,train\n", "")
    with pytest.raises(UserError, match="split train holds other images"):
        store.split(load_dataset("csv", str(data)).train)
    os.rename(data / "query" / "é 6.jpg", data / "query" / "other.jpg")
    rewrite(data / "split.csv", "query/é 6.jpg", "query/other.jpg")
    with pytest.raises(UserError, match="split query holds other images"):
        store.split(load_dataset("csv", str(data)).query)
    classes = tmp_path / "folder"
    test = (f"test/{label}/{i}.jpg" for label in "bd" for i in range(2))
    for name in ("train/a/1.jpg", "train/c/1.jpg", *test):
        (classes / name).parent.mkdir(parents=True, exist_ok=True)
        smooth(1, (8, 8)).save(classes / name)
    with pytest.raises(UserError, match="no split test"):
        store.split(load_dataset("folder", str(classes)).query)


def test_every_damage_is_refused(data, tmp_path):
    catalog = load_dataset("csv", str(data))
    good = pack(catalog, tmp_path / "s.pack", resize_size=32, progress=False).read_bytes()
    file = tmp_path / "damaged.pack"

    def refused(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            PackedStore.open(file)
        return str(caught.value)

    assert "half-written" in refused(b"")
    assert "half-written" in refused(bytes(PROLOGUE.size) + good[PROLOGUE.size :])
    assert "not a packed store" in refused(b"\xff\xd8" + good[2:])
    assert "not a packed store" in refused(b"x")
    assert "format version 9" in refused(good[:8] + b"\x09" + good[9:])
    for length in (10, PROLOGUE.size - 1, PROLOGUE.size, len(good) // 2, len(good) - 1):
        assert "truncated" in refused(good[:length])
    assert "overwritten" in refused(good + b"\0")
    assert "no.pack: cannot be read" in pytest.raises(UserError, PackedStore.open, tmp_path / "no.pack").value.args[0]
    # One flipped bit anywhere is found: at once, or when the image is read.
    positions = [*range(0, PROLOGUE.size - 4), *np.random.default_rng(0).integers(PROLOGUE.size, len(good), 400)]
    in_images = 0
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
        in_images += 1
    assert in_images > 100


def test_threads_read_at_once(data, tmp_path):
    catalog = load_dataset("csv", str(data))
    source = store_of(catalog, tmp_path / "s.pack").split(catalog.train)
    expected = [source.read(i).tobytes() for i in range(6)]
    barrier = threading.Barrier(4)

    def work(_) -> bool:
        barrier.wait()
        return all(source.read(i % 6).tobytes() == expected[i % 6] for i in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_the_source_files_are_not_read_again(data, tmp_path):
    catalog = load_dataset("csv", str(data))
    store = store_of(catalog, tmp_path / "s.pack")
    shutil.rmtree(data)
    assert by_pillow(store.split(catalog.gallery).read(3).tobytes()).shape == (32, 32, 3)
