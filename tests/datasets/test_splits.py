"""Folder layouts: names of splits, which folders are classes, which splits a command needs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastirt.datasets import check_recall_ks, load_dataset, warn_of_copies
from fastirt.errors import UserError
from tests.datasets.files import refusal, touch


def classes(root: Path, *names: str, each: int = 2) -> None:
    """Empty files in class folders."""
    touch(root, *(f"{name}/{i}.jpg" for name in names for i in range(each)))


def counts(catalog) -> dict[str, tuple[int, int]]:
    """Split -> (images, classes)"""
    return {split.name: (len(split), len(np.unique(split.labels))) for split in catalog.splits()}


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "test")])
def test_split_folders_in_any_case_and_by_synonyms(tmp_path, names):
    classes(tmp_path, f"{names[0]}/a", f"{names[0]}/b", f"{names[1]}/c", f"{names[1]}/d", f"{names[1]}/e")
    assert counts(load_dataset("folder", str(tmp_path))) == {"train": (4, 2), "test": (6, 3)}


@pytest.mark.parametrize("name", ["val", "Valid", "validation"])
def test_val_is_used_where_it_is_alone_and_chosen_beside_test(tmp_path, caplog, name):
    caplog.set_level(logging.INFO, "fastirt")
    classes(tmp_path, "train/a", "train/b", f"{name}/c", f"{name}/d")
    assert counts(load_dataset("folder", str(tmp_path))) == {"train": (4, 2), "val": (4, 2)}
    assert "evaluation uses the val split" in caplog.text
    classes(tmp_path, "test/e", "test/f", "test/g")
    assert counts(load_dataset("folder", str(tmp_path)))["test"] == (6, 3)
    assert "--eval-split val" in caplog.text
    assert "test" not in counts(load_dataset("folder", str(tmp_path), eval_split="val"))


def test_query_and_gallery_by_synonyms(tmp_path):
    classes(tmp_path, "Training/a", "Training/b", "queries/c", "queries/d", "Database/c", "Database/d")
    assert counts(load_dataset("folder", str(tmp_path))) == {"train": (4, 2), "query": (4, 2), "gallery": (4, 2)}


def test_two_folders_of_one_split_are_refused(tmp_path):
    classes(tmp_path, "train/a", "train/b", "Training/a", "test/c", "test/d")
    text = refusal("folder", tmp_path)
    assert "Training/ and train/" in text


@pytest.mark.parametrize("names", [("images", "segmentations"), ("trn", "tst"), ("images", "masks", "depth")])
def test_folders_of_class_folders_are_no_classes(tmp_path, names):
    for name in names:
        classes(tmp_path, f"{name}/a", f"{name}/b", f"{name}/c", f"{name}/d")
    classes(tmp_path, "docs")  # images of its own do not make the others classes
    for _ in range(2):
        text = refusal("folder", tmp_path, training=False)
        assert "not understood" in text and f"--data-path {tmp_path / sorted(names)[0]}" in text
        for file in (tmp_path / "docs").iterdir():
            file.unlink()


def test_one_wrapping_folder_is_entered_and_said(tmp_path, caplog):
    classes(tmp_path, *(f"data/images/{c}" for c in "abcd"))
    touch(tmp_path, "data/attributes/list.txt")
    assert counts(load_dataset("folder", str(tmp_path))) == {"train": (4, 2), "test": (4, 2)}
    assert f"{tmp_path}/data/images" in caplog.text


def test_sub_folders_of_some_classes_belong_to_the_class(tmp_path, caplog):
    classes(tmp_path, "a/front", "a/back", "b", "c", "d")
    assert counts(load_dataset("folder", str(tmp_path))) == {"train": (6, 2), "test": (4, 2)}
    assert "a: images only in sub-folders" in caplog.text


def test_a_lone_split_beside_classes_is_refused(tmp_path):
    classes(tmp_path, "train/steam", "train/electric", "car", "doll")
    assert "the split test is missing, or train/ is a class" in refusal("folder", tmp_path)


def test_splits_that_a_command_needs(tmp_path, caplog):
    classes(tmp_path, "train/a", "train/b")
    assert counts(load_dataset("folder", str(tmp_path))) == {"train": (4, 2)}
    assert "evaluation is skipped" in caplog.text
    assert load_dataset("folder", str(tmp_path), training=None).query is None
    assert "the split test is missing (found: train)" in refusal("folder", tmp_path, training=False)
    (tmp_path / "train").rename(tmp_path / "test")
    assert "the split train is missing (found: test)" in refusal("folder", tmp_path)
    for training in (False, None):
        assert load_dataset("folder", str(tmp_path), training=training).train is None


def test_one_class_is_refused_where_it_decides_the_figure(tmp_path, caplog):
    classes(tmp_path, "train/a", "test/c", "test/d")
    assert "the train split has one class only (a)" in refusal("folder", tmp_path)
    assert counts(load_dataset("folder", str(tmp_path), training=False))["test"] == (4, 2)
    classes(tmp_path / "one", "train/a", "train/b", "test/c")
    assert "the test split has one class only (c)" in refusal("folder", tmp_path / "one")


def test_what_is_left_out_is_counted_in_one_warning(tmp_path, caplog):
    classes(tmp_path, "a", "b", "c", "d", "__other__", "__MACOSX", each=3)
    for name in ("a/x.txt", "a/y.txt", "b/z.xml", "b/.DS_Store", "c/Thumbs.db", "a/none", "loose.jpg"):
        (tmp_path / name).write_bytes(b"text")
    load_dataset("folder", str(tmp_path))
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "2 .txt, 1 without extension, 1 .xml" in line or "2 .txt, 1 .xml, 1 without extension" in line
    assert "class folder __other__ (3 files)" in line
    assert "1 image in no class folder: loose.jpg" in line
    for name in ("MACOSX", "DS_Store", "humbs"):
        assert name not in line


def test_images_of_every_format_are_listed(tmp_path):
    classes(tmp_path, "a", "b", "c")
    formats = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c": "JPEG", "d.gif": "GIF", "e.avif": "AVIF", "f.jp2": "JPEG2000"}
    formats |= {"g": "PNG", "IMG.2019": "WEBP", "h": "BMP", "i": "TIFF", "j.jpg_large": "JPEG", "k.TGA": "TGA"}
    (tmp_path / "d").mkdir()
    for name, kind in formats.items():
        Image.new("RGB", (8, 8)).save(tmp_path / "d" / name, format=kind)
    catalog = load_dataset("folder", str(tmp_path))
    assert {Path(path).name for path in catalog.query.paths if "/d/" in path} == set(formats)


def test_copies_are_counted(tmp_path, caplog):
    classes(tmp_path, "train/a", "train/b", "test/c", "test/d", each=4)
    for i, file in enumerate(sorted(tmp_path.rglob("*.jpg"))):
        file.write_bytes(bytes([i]) * 10_000)  # one size: told apart by their content
    catalog = load_dataset("folder", str(tmp_path))
    assert warn_of_copies(catalog) == 0
    (tmp_path / "test/d/0.jpg").write_bytes((tmp_path / "test/c/0.jpg").read_bytes())
    (tmp_path / "test/d/1.jpg").write_bytes((tmp_path / "train/a/0.jpg").read_bytes())
    # changes no figure
    (tmp_path / "train/a/2.jpg").write_bytes((tmp_path / "train/a/1.jpg").read_bytes())
    (tmp_path / "train/b/1.jpg").write_bytes((tmp_path / "train/b/0.jpg").read_bytes())
    # teaches that one is two
    (tmp_path / "train/b/3.jpg").write_bytes((tmp_path / "train/a/3.jpg").read_bytes())
    end = bytearray((tmp_path / "test/c/2.jpg").read_bytes())
    end[-1] ^= 1  # equal in the part that is read first
    (tmp_path / "test/d/2.jpg").write_bytes(end)
    (tmp_path / "test/c/1.jpg").unlink()
    (tmp_path / "test/c/3.jpg").write_bytes((tmp_path / "test/c/0.jpg").read_bytes())
    (tmp_path / "test/d/3.jpg").unlink()
    # one file, which `check_files` tells of
    (tmp_path / "test/d/3.jpg").hardlink_to(tmp_path / "test/d/0.jpg")
    caplog.clear()
    assert warn_of_copies(catalog) == 4
    same, other = (record.getMessage() for record in caplog.records)
    assert "inflates the metrics" in same and "test/c/3.jpg is a copy of test/c/0.jpg" in same
    assert "3 images" in other and "of another class" in other
    assert "test/d/1.jpg is a copy of train/a/0.jpg" in other


def test_ranks_without_the_own_file(tmp_path):
    classes(tmp_path, "query/a", "query/b")
    (tmp_path / "gallery").symlink_to("query")
    catalog = load_dataset("folder", str(tmp_path), training=False)
    assert catalog.own.tolist() == [0, 1, 2, 3] and catalog.own.dtype == np.int64
    check_recall_ks(catalog, (1, 3))
    with pytest.raises(UserError, match="--rank 4"):
        check_recall_ks(catalog, (4,))


def test_labels_that_differ_in_case_alone_are_named(tmp_path, caplog):
    classes(tmp_path, "train/a", "train/b", "test/shoe", "test/SHOE", "test/d")
    load_dataset("folder", str(tmp_path))
    assert "1 label" in caplog.text and "'shoe'" in caplog.text
