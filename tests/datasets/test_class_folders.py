"""Class folders: which classes train where there are no split folders, and what is refused."""

from __future__ import annotations

from fastirt.datasets import load_dataset
from tests.datasets.files import refusal, rows, touch


def test_folder_half_of_the_classes_trains(tmp_path, caplog):
    names = "b/2.JPG b/1.png b/notes.txt b/.hidden.jpg a/deep/er/x.jpeg a/y.jpg c/1.jpg c/2.jpg e/1.webp e/2.bmp"
    touch(tmp_path, *names.split(), *"train/1.jpg train/2.jpg .cache/z.jpg loose.jpg".split())
    (tmp_path / "d").mkdir()
    catalog = load_dataset("folder", str(tmp_path))
    train = [("a/deep/er/x.jpeg", "a"), ("a/y.jpg", "a"), ("b/1.png", "b"), ("b/2.JPG", "b")]
    assert rows(catalog.train, catalog) == train
    assert [name for _, name in rows(catalog.query, catalog)] == ["c", "c", "e", "e", "train", "train"]
    assert "1 class folders hold no images" in caplog.text
    assert ": d" in caplog.text


def test_folder_with_splits(tmp_path, caplog):
    touch(tmp_path, "train/x/1.jpg", "train/w/1.jpg", "test/x/1.jpg", "test/x/2.jpg", "test/y/1.jpg", "other/z/1.jpg")
    catalog = load_dataset("folder", str(tmp_path))
    assert rows(catalog.query, catalog) == [("test/x/1.jpg", "x"), ("test/x/2.jpg", "x"), ("test/y/1.jpg", "y")]
    assert catalog.class_names == ("w", "x", "y") and list(catalog.query.labels) == [1, 1, 2]
    for words in ("not read", "other", "1 of 2 test classes", "1 of 3 queries", "test/y/1.jpg"):
        assert words in caplog.text

    (tmp_path / "test").rename(tmp_path / "query")
    assert "gallery is missing" in refusal("folder", tmp_path)
    touch(tmp_path, "gallery/x/9.jpg")
    assert "gallery split has one class only (x)" in refusal("folder", tmp_path)
    touch(tmp_path, "gallery/v/9.jpg")
    catalog = load_dataset("folder", str(tmp_path))
    assert rows(catalog.gallery, catalog) == [("gallery/v/9.jpg", "v"), ("gallery/x/9.jpg", "x")]
    assert len(catalog.query) == 3


def test_folder_errors(tmp_path):
    assert "no such folder" in refusal("folder", tmp_path / "none")
    assert "no images" in refusal("folder", tmp_path)
    touch(tmp_path, "a/1.jpg", "a/2.jpg")
    assert "one class only" in refusal("folder", tmp_path)
    assert "not a folder" in refusal("folder", tmp_path / "a/1.jpg")
    touch(tmp_path, "b/1.jpg", "c/1.jpg")
    assert "at least 2 images of a class" in refusal("folder", tmp_path)  # no query has a match
    touch(tmp_path, "train/a/1.jpg")
    assert "test is missing" in refusal("folder", tmp_path)
    (tmp_path / "test/a").mkdir(parents=True)
    assert "no images" in refusal("folder", tmp_path)
