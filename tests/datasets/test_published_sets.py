"""CUB-200, SOP and In-Shop on disk: layouts, splits, counts and error messages."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import fastirt.datasets.cub_sop_inshop
from fastirt.datasets import load_dataset
from tests.datasets.files import refusal, rows, touch

CUB = [f"{c:03d}.Bird{c}/B_{i}.jpg" for c in range(1, 201) for i in range(2)]


def cub(root: Path, listed: bool = True) -> Path:
    touch(root / "CUB_200_2011" / "images", *CUB)
    if listed:
        lines = (f"{i} {name}" for i, name in enumerate(reversed(CUB), 1))
        (root / "CUB_200_2011" / "images.txt").write_text("\n".join(lines) + "\n")
    return root / "CUB_200_2011"


@pytest.mark.parametrize("listed", [True, False])
def test_cub_first_hundred_classes_train_and_counts_are_said(tmp_path, caplog, listed):
    root = cub(tmp_path, listed)
    catalog = load_dataset("cub200", str(tmp_path if listed else root))  # the folder or its parent
    assert catalog.gallery is None
    assert (catalog.train.name, catalog.query.name) == ("train", "test")
    assert rows(catalog.train, catalog) == [(f"images/{name}", name.split("/")[0]) for name in CUB[:200]]
    assert rows(catalog.query, catalog) == [(f"images/{name}", name.split("/")[0]) for name in CUB[200:]]
    assert catalog.train.labels.dtype == np.int64
    assert list(np.unique(catalog.query.labels)) == list(range(100, 200))
    for count in ("200 train images", "5,864", "5,924"):
        assert count in caplog.text


def test_what_is_wrong_with_a_cub_folder_is_named_by_row(tmp_path):
    root = cub(tmp_path)
    (root / "images" / CUB[-3]).unlink()
    (root / "images" / CUB[0]).unlink()
    text = refusal("cub200", root)
    for words in ("images.txt: row 3", CUB[-3], "2 of 400"):
        assert words in text
    (root / "images.txt").write_text("1 a/b.jpg\nonly\n")
    assert "images.txt: row 2" in refusal("cub200", root)
    assert "no such folder" in refusal("cub200", tmp_path / "nowhere")
    assert "images" in refusal("cub200", tmp_path / "CUB_200_2011" / "images")


def sop(root: Path) -> Path:
    number = 0
    for split, classes in (("train", (1, 2)), ("test", (10, 11))):
        lines = ["image_id class_id super_class_id path"]
        for label in classes:
            for i in range(3):
                number += 1
                lines.append(f"{number} {label} 1 bicycle_final/{label}_{i}.JPG")
                touch(root, f"bicycle_final/{label}_{i}.JPG")
        (root / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_sop_and_what_is_wrong_with_its_lists(tmp_path, caplog):
    root = sop(tmp_path / "Stanford_Online_Products")
    catalog = load_dataset("sop", str(tmp_path))
    assert catalog.class_names == ("1", "2", "10", "11")
    assert list(catalog.query.labels) == [2, 2, 2, 3, 3, 3]
    assert rows(catalog.train, catalog)[3] == ("bicycle_final/2_0.JPG", "2")
    assert catalog.gallery is None
    assert "59,551" in caplog.text and "60,502" in caplog.text
    (root / "bicycle_final/11_1.JPG").unlink()
    assert "Ebay_test.txt: row 6: no file 'bicycle_final/11_1.JPG'" in refusal("sop", root)
    (root / "Ebay_train.txt").write_text("image_id class_id super_class_id path\n1 1 1\n")
    assert "Ebay_train.txt: row 2" in refusal("sop", root)
    (root / "Ebay_train.txt").write_text("image_id class_id super_class_id path\n")
    assert "no images for the split train" in refusal("sop", root)
    (root / "Ebay_train.txt").write_text("1 1 1 bicycle_final/1_0.JPG\n")
    assert "header" in refusal("sop", root)
    (root / "Ebay_train.txt").unlink()
    assert "Ebay_train.txt" in refusal("sop", root)


INSHOP = {
    "train": ["W/D/id_1/a.jpg id_1", "W/D/id_1/b.jpg id_1"],
    "query": ["M/T/id_7/q.jpg id_7"],
    "gallery": ["M/T/id_7/g.jpg id_7", "M/T/id_9/g.jpg id_9"],
}


def inshop(root: Path, list_file: str, images: str) -> Path:
    lines = ["5", "image_name item_id evaluation_status"]
    for split, names in INSHOP.items():
        for name in names:
            lines.append("img/{}      {} {}".format(*name.split(), split))
            touch(root, f"{images}/{name.split()[0]}")
    (root / list_file).parent.mkdir(parents=True, exist_ok=True)
    (root / list_file).write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("list_file", ["list_eval_partition.txt", "Eval/list_eval_partition.txt"])
@pytest.mark.parametrize("images", ["img", "Img/img"])
def test_inshop_in_its_layouts(tmp_path, caplog, list_file, images):
    catalog = load_dataset("inshop", str(inshop(tmp_path, list_file, images)))
    assert rows(catalog.gallery, catalog) == [
        (f"{images}/M/T/id_7/g.jpg", "id_7"),
        (f"{images}/M/T/id_9/g.jpg", "id_9"),
    ]
    assert [s.name for s in catalog.splits()] == ["train", "query", "gallery"]
    assert all(count in caplog.text for count in ("25,882", "14,218", "12,612"))
    (tmp_path / images / "M/T/id_7/q.jpg").unlink()
    assert "list_eval_partition.txt: row 5: no file 'img/M/T/id_7/q.jpg'" in refusal("inshop", tmp_path)
    file = tmp_path / list_file
    file.write_text(file.read_text().replace(" query", " quest"))
    assert "row 5: 'quest'" in refusal("inshop", tmp_path)


def test_an_incomplete_inshop_folder_is_named(tmp_path):
    assert "list_eval_partition.txt" in refusal("inshop", tmp_path)
    inshop(tmp_path, "list_eval_partition.txt", "pictures")
    assert "neither img/ nor Img/img/" in refusal("inshop", tmp_path)
    touch(tmp_path, "img/x.jpg")
    (tmp_path / "list_eval_partition.txt").write_text("image_name item_id evaluation_status\nimg/x.jpg id_1 train\n")
    assert "split query" in refusal("inshop", tmp_path)


def test_published_counts_are_not_warned_about(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(fastirt.datasets.cub_sop_inshop.COUNTS, "sop", {"train": 6, "test": 6})
    load_dataset("sop", str(sop(tmp_path)))
    assert not caplog.records


def test_warnings_are_one_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastirt"):
        load_dataset("cub200", str(cub(tmp_path)))
    assert caplog.records and all("\n" not in record.getMessage() for record in caplog.records)
