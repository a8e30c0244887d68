"""Links in data sets: each file once, under its own class, and never a query's own answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from tests.datasets.files import touch


@pytest.fixture
def data(tmp_path) -> Path:
    root = tmp_path / "set"
    touch(root, *(f"class{label:02d}/{i}.png" for label in range(20) for i in range(4)))
    return root


def names(root: Path, **kwargs) -> tuple[list[str], list[str]]:
    catalog = load_dataset("folder", str(root), **kwargs)
    return tuple([os.path.relpath(p, root) for p in split.paths] for split in (catalog.train, catalog.query))


@pytest.mark.parametrize(
    "link, target, said",
    [
        ("class15/backup", ".", "1 link leads to a folder"),
        ("class15/up", "..", "1 link leads to a folder"),
        ("class15/upper", "../..", "1 link leads to a folder"),
        ("loop", ".", "1 link leads to a folder"),
        ("class15/other", "../class03", "4 images behind 1 link: class15/other"),
        ("alias", "class03", "4 images behind 1 link: alias"),
        ("class15/x.png", "../class03/0.png", "1 image behind 1 link: class15/x.png"),
        ("class15/x.png", "0.png", "'class15/x.png' is 'class15/0.png'"),
        ("class15/x", "x", "1 link or special file"),
        ("class15/x.png", "nowhere.png", "1 link or special file"),
    ],
)
def test_a_link_changes_nothing_and_is_named(data, caplog, link, target, said):
    before = names(data)
    (data / link).symlink_to(target)
    assert names(data) == before
    assert said in caplog.text and link in caplog.text


def test_chains_and_folders_elsewhere_are_followed_once(data, caplog):
    before = names(data)
    elsewhere = data.parent / "elsewhere" / "inner"
    elsewhere.mkdir(parents=True)
    (elsewhere / "new.png").touch()
    (elsewhere / "back").symlink_to(data)
    (data / "class15" / "first").symlink_to(elsewhere.parent)
    (data / "class15" / "second").symlink_to("first")
    train, test = names(data)
    assert train == before[0]
    assert sorted(set(test) - set(before[1])) == ["class15/first/inner/new.png"]
    assert len(test) == len(before[1]) + 1 and "2 links lead" in caplog.text


def test_a_special_file_is_not_opened(data, caplog):
    os.mkfifo(data / "class15" / "pipe.png")
    os.mkfifo(data / "class15" / "pipe")
    assert len(names(data)[1]) == 40 and "class15/pipe" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_named(data, caplog):
    (data / "class15").chmod(0)
    assert len(names(data)[1]) == 36 and "1 folder cannot be read" in caplog.text
    (data / "class15").chmod(0o755)


def test_hard_links_within_a_class_count_once(data, caplog):
    before = names(data)
    os.link(data / "class15" / "0.png", data / "class15" / "z.png")
    assert names(data) == before and "'class15/z.png' is 'class15/0.png'" in caplog.text


def test_two_labels_are_named_and_refused_where_they_decide(data, caplog):
    os.link(data / "class16" / "0.png", data / "class15" / "z.png")
    names(data)
    assert "1 image is under two labels" in caplog.text
    for i in range(1, 4):
        os.link(data / "class16" / f"{i}.png", data / "class15" / f"z{i}.png")
    with pytest.raises(UserError, match="4 images .* 8 of 44 queries"):
        load_dataset("folder", str(data))
    # packing measures nothing
    assert len(load_dataset("folder", str(data), training=None).query) == 44


def test_a_gallery_under_two_labels_is_refused_and_one_of_training_images_named(tmp_path, caplog):
    gallery = (f"gallery/{label}/{i}.png" for label in "ab" for i in range(3))
    touch(tmp_path, "query/a/0.png", "query/b/0.png", *gallery)
    (tmp_path / "train").symlink_to(tmp_path / "gallery")
    load_dataset("folder", str(tmp_path))
    assert "6 evaluation images are in the training split" in caplog.text
    os.link(tmp_path / "gallery/a/0.png", tmp_path / "gallery/b/again.png")
    with pytest.raises(UserError, match="1 image .* 2 of 7 gallery"):
        load_dataset("folder", str(tmp_path), training=False)


def test_test_images_that_train_are_named_and_refused_where_they_decide(tmp_path, data, caplog):
    root = tmp_path / "splits"
    (root / "test").mkdir(parents=True)
    (root / "train").symlink_to(data)
    for label in (3, 4):
        (root / "test" / f"class{label:02d}").symlink_to(data / f"class{label:02d}")
    for training in (True, False):
        with pytest.raises(UserError, match="8 evaluation images .* training split .* 8 of 8 queries"):
            load_dataset("folder", str(root), training=training)
    for label in (3, 4):
        (root / "test" / f"class{label:02d}").unlink()
        (root / "test" / f"class{label:02d}").mkdir()
        for i in range(10):
            (root / "test" / f"class{label:02d}" / f"new{i}.png").touch()
    os.link(data / "class03" / "1.png", root / "test" / "class03" / "again.png")
    assert len(names(root)[1]) == 21
    assert "1 evaluation image is in the training split" in caplog.text


def test_own_file_through_link_and_hard_link(tmp_path):
    touch(tmp_path, "query/a/1.png", "query/a/2.png", "query/b/3.png", "gallery/a/4.png", "gallery/b/5.png")
    assert load_dataset("folder", str(tmp_path), training=False).own is None
    (tmp_path / "gallery/a/0.png").symlink_to("../../query/a/2.png")
    os.link(tmp_path / "query/b/3.png", tmp_path / "gallery/b/6.png")
    catalog = load_dataset("folder", str(tmp_path), training=False)
    assert catalog.own.tolist() == [-1, 0, 3]  # gallery: a/0, a/4, b/5, b/6
