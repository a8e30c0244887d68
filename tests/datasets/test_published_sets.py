"""Data sets on disk: layouts, splits, and what the user is told when something is wrong."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

import fastirt.datasets.cub_sop_inshop
from fastirt.datasets import Catalog, Split, check_recall_ks, load_dataset, unmatched_queries
from fastirt.datasets.listing import missing
from fastirt.errors import UserError


def touch(root: Path, *names: str) -> None:
    """Empty files: a catalogue never opens an image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def rows(split: Split, catalog: Catalog) -> list[tuple[str, str]]:
    """(relative path, class name)"""
    return [
        (os.path.relpath(path, catalog.root), catalog.class_names[label])
        for path, label in zip(split.paths, split.labels)
    ]


def error(dataset: str, path: Path) -> str:
    """The UserError's text, always one line."""
    with pytest.raises(UserError) as caught:
        load_dataset(dataset, str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert catalog.gallery is None and (catalog.train.name, catalog.query.name) == ("train", "test")
    assert rows(catalog.train, catalog) == [(f"images/{name}", name.split("/")[0]) for name in CUB[:200]]
    assert rows(catalog.query, catalog) == [(f"images/{name}", name.split("/")[0]) for name in CUB[200:]]
    assert catalog.train.labels.dtype == np.int64 and list(np.unique(catalog.query.labels)) == list(range(100, 200))
    assert "200 train images" in caplog.text and "5,864 are published" in caplog.text and "5,924" in caplog.text


def test_cub_errors(tmp_path):
    root = cub(tmp_path)
    (root / "images" / CUB[-3]).unlink()
    (root / "images" / CUB[0]).unlink()
    text = error("cub200", root)
    assert "images.txt: row 3" in text and CUB[-3] in text and "2 of 400 are missing" in text
    (root / "images.txt").write_text("1 a/b.jpg\nonly\n")
    assert "images.txt: row 2" in error("cub200", root)
    assert "no such folder" in error("cub200", tmp_path / "nowhere")
    assert "images" in error("cub200", tmp_path / "CUB_200_2011" / "images")


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


def test_sop(tmp_path, caplog):
    root = sop(tmp_path / "Stanford_Online_Products")
    catalog = load_dataset("sop", str(tmp_path))
    assert catalog.class_names == ("1", "2", "10", "11") and list(catalog.query.labels) == [2, 2, 2, 3, 3, 3]
    assert rows(catalog.train, catalog)[3] == ("bicycle_final/2_0.JPG", "2") and catalog.gallery is None
    assert "59,551" in caplog.text and "60,502" in caplog.text
    (root / "bicycle_final/11_1.JPG").unlink()
    assert "Ebay_test.txt: row 6: no file 'bicycle_final/11_1.JPG'" in error("sop", root)
    (root / "Ebay_train.txt").write_text("image_id class_id super_class_id path\n1 1 1\n")
    assert "Ebay_train.txt: row 2" in error("sop", root)
    (root / "Ebay_train.txt").write_text("image_id class_id super_class_id path\n")
    assert "no images for the split train" in error("sop", root)
    (root / "Ebay_train.txt").write_text("1 1 1 bicycle_final/1_0.JPG\n")
    assert "header" in error("sop", root)
    (root / "Ebay_train.txt").unlink()
    assert "Ebay_train.txt" in error("sop", root)


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
def test_inshop(tmp_path, caplog, list_file, images):
    catalog = load_dataset("inshop", str(inshop(tmp_path, list_file, images)))
    assert rows(catalog.gallery, catalog) == [
        (f"{images}/M/T/id_7/g.jpg", "id_7"),
        (f"{images}/M/T/id_9/g.jpg", "id_9"),
    ]
    assert [s.name for s in catalog.splits()] == ["train", "query", "gallery"]
    assert all(count in caplog.text for count in ("25,882", "14,218", "12,612"))
    (tmp_path / images / "M/T/id_7/q.jpg").unlink()
    assert "list_eval_partition.txt: row 5: no file 'img/M/T/id_7/q.jpg'" in error("inshop", tmp_path)
    file = tmp_path / list_file
    file.write_text(file.read_text().replace(" query", " quest"))
    assert "row 5: 'quest'" in error("inshop", tmp_path)


def test_inshop_errors(tmp_path):
    assert "list_eval_partition.txt" in error("inshop", tmp_path)
    inshop(tmp_path, "list_eval_partition.txt", "pictures")
    assert "neither img/ nor Img/img/" in error("inshop", tmp_path)
    touch(tmp_path, "img/x.jpg")
    (tmp_path / "list_eval_partition.txt").write_text("image_name item_id evaluation_status\nimg/x.jpg id_1 train\n")
    assert "split query" in error("inshop", tmp_path)


def test_published_counts_are_not_warned_about(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(fastirt.datasets.cub_sop_inshop.COUNTS, "sop", {"train": 6, "test": 6})
    load_dataset("sop", str(sop(tmp_path)))
    assert not caplog.records


def test_folder_half_of_the_classes_trains(tmp_path, caplog):
    touch(
        tmp_path,
        "b/2.JPG",
        "b/1.png",
        "b/notes.txt",
        "b/.hidden.jpg",
        "a/deep/er/x.jpeg",
        "a/y.jpg",
        "c/1.jpg",
        "c/2.jpg",
        "e/1.webp",
        "e/2.bmp",
        "train/1.jpg",
        "train/2.jpg",
        ".cache/z.jpg",
        "loose.jpg",
    )
    (tmp_path / "d").mkdir()
    catalog = load_dataset("folder", str(tmp_path))
    assert rows(catalog.train, catalog) == [
        ("a/deep/er/x.jpeg", "a"),
        ("a/y.jpg", "a"),
        ("b/1.png", "b"),
        ("b/2.JPG", "b"),
    ]
    assert [name for _, name in rows(catalog.query, catalog)] == ["c", "c", "e", "e", "train", "train"]
    assert "1 class folders hold no images" in caplog.text and ": d" in caplog.text


def test_folder_with_splits(tmp_path, caplog):
    touch(tmp_path, "train/x/1.jpg", "train/w/1.jpg", "test/x/1.jpg", "test/x/2.jpg", "test/y/1.jpg", "other/z/1.jpg")
    catalog = load_dataset("folder", str(tmp_path))
    assert rows(catalog.query, catalog) == [("test/x/1.jpg", "x"), ("test/x/2.jpg", "x"), ("test/y/1.jpg", "y")]
    assert catalog.class_names == ("w", "x", "y") and list(catalog.query.labels) == [1, 1, 2]
    assert "not read" in caplog.text and "other" in caplog.text
    assert "1 of 2 test classes are also training classes" in caplog.text
    assert "1 of 3 queries have no match" in caplog.text and "test/y/1.jpg" in caplog.text

    (tmp_path / "test").rename(tmp_path / "query")
    assert "gallery is missing" in error("folder", tmp_path)
    touch(tmp_path, "gallery/x/9.jpg")
    assert "the gallery split has one class only (x)" in error("folder", tmp_path)
    touch(tmp_path, "gallery/v/9.jpg")
    catalog = load_dataset("folder", str(tmp_path))
    assert rows(catalog.gallery, catalog) == [("gallery/v/9.jpg", "v"), ("gallery/x/9.jpg", "x")]
    assert len(catalog.query) == 3


def test_folder_errors(tmp_path):
    assert "no such folder" in error("folder", tmp_path / "none")
    assert "no images" in error("folder", tmp_path)
    touch(tmp_path, "a/1.jpg", "a/2.jpg")
    assert "one class only" in error("folder", tmp_path)
    assert "not a folder" in error("folder", tmp_path / "a/1.jpg")
    touch(tmp_path, "b/1.jpg", "c/1.jpg")
    assert "at least 2 images of a class" in error("folder", tmp_path)  # no query has a match
    touch(tmp_path, "train/a/1.jpg")
    assert "test is missing" in error("folder", tmp_path)
    (tmp_path / "test/a").mkdir(parents=True)
    assert "no images" in error("folder", tmp_path)


def write_csv(root: Path, text: str, encoding: str = "utf-8", name: str = "split.csv") -> Path:
    touch(root, "p/1.jpg", "p/2.jpg", "q/ü, 3.jpg", "q/4.jpg", "5.jpg")
    (root / name).write_text(text, encoding=encoding)
    return root


GOOD = 'path,label,split\np/1.jpg,cat,train\np/2.jpg,10,test\n\n"q/ü, 3.jpg",10,test\nq/4.jpg,cat,test\n'


def test_csv(tmp_path, caplog):
    write_csv(tmp_path, (GOOD + "5.jpg,dog,train\n").replace("\n", "\r\n"), "utf-8-sig", "own.csv")
    catalog = load_dataset("csv", str(tmp_path / "own.csv"))
    assert rows(catalog.train, catalog) == [("p/1.jpg", "cat"), ("5.jpg", "dog")]
    assert rows(catalog.query, catalog) == [("p/2.jpg", "10"), ("q/ü, 3.jpg", "10"), ("q/4.jpg", "cat")]
    assert list(catalog.query.labels) == [2, 2, 0] and catalog.gallery is None
    assert "1 of 3 queries" in caplog.text and "the first is row 6 'q/4.jpg'" in caplog.text

    text = "weight,Split, Label ,path\n1,query,b,p/2.jpg\n2,gallery,b,./q/4.jpg\n3,gallery,c,5.jpg\n"
    write_csv(tmp_path, text)
    catalog = load_dataset("csv", str(tmp_path), training=False)  # the folder that holds split.csv
    assert catalog.gallery.name == "gallery" and len(catalog.gallery) == 2 and len(catalog.query) == 1
    assert "all 1 queries are of one class (b)" in caplog.text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "the file is empty"),
        ("path,label,split\n", "no rows"),
        ("path|label|split\np/1.jpg|a|train\n", "no column path and no column label and no column split"),
        ("path,label\np/1.jpg,a\n", "row 1: no column split"),
        (GOOD.replace("p/2.jpg,10,test", "p/2.jpg,10,dev"), "split.csv: row 3: unknown split 'dev'"),
        (GOOD.replace("q/4.jpg", "q/44.jpg"), "split.csv: row 6: no file 'q/44.jpg' under "),
        (GOOD.replace("q/4.jpg", "p/../p/1.jpg"), "split.csv: row 6: 'p/../p/1.jpg' is listed in row 2 already"),
        (GOOD.replace("q/4.jpg", "q"), "row 6: no file 'q'"),  # a folder is no image
        (GOOD.replace("q/4.jpg,cat", "q/4.jpg,"), "row 6: the column label is empty"),
        (GOOD.replace('"', ""), "row 5: 4 fields for 3 columns"),
        (GOOD.replace('"q/ü', '"q"/ü'), "row 5: not a CSV row"),
        (GOOD.replace("train", "test"), "the split train is missing (found: test)"),
        (GOOD.replace("test", "query"), "the split gallery is missing"),
        (GOOD + "5.jpg,cat,query\n", "the split gallery is missing"),
        ("path,label,split\np/1.jpg,a,train\n", "the train split has one class only (a)"),
        ("path,label,split\np/1.jpg,a,train\np/2.jpg,a,test\nq/4.jpg,b,test\n", "at least 2 images of a class"),
    ],
)
def test_csv_errors_name_file_and_row(tmp_path, text, expected):
    assert expected in error("csv", write_csv(tmp_path, text))


def test_csv_encoding_and_absence(tmp_path):
    write_csv(tmp_path, GOOD, "latin-1")
    assert "split.csv: row 5: not UTF-8" in error("csv", tmp_path)
    assert "none.csv: cannot be read" in error("csv", tmp_path / "none.csv")
    (tmp_path / "split.csv").unlink()
    assert "path,label,split" in error("csv", tmp_path)


def test_demo(tmp_path):
    assert "fastirt demo OUT" in error("demo", tmp_path / "none")
    touch(tmp_path, "train/a/1.jpg", "test/b/1.jpg", "test/b/2.jpg")
    assert "fastirt demo OUT" in error("demo", tmp_path)
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 0}))
    catalog = load_dataset("demo", str(tmp_path))
    assert catalog.dataset == "demo" and (len(catalog.train), len(catalog.query)) == (1, 2)
    (tmp_path / "demo.json").write_text("{half")
    assert "demo.json" in error("demo", tmp_path)


def test_unknown_dataset():
    assert "use one of cub200" in error("cars196", Path("/"))


def catalog_of(query: list[int], gallery: list[int] | None) -> Catalog:
    def split(name: str, labels: list[int]) -> Split:
        return Split(name, tuple(f"/d/{name}{i}" for i in range(len(labels))), np.array(labels, dtype=np.int64))

    own = gallery is None
    return Catalog(
        "csv",
        "/d",
        split("train", [0]),
        split("test" if own else "query", query),
        None if own else split("gallery", gallery),
        tuple("abcde"),
    )


def test_unmatched_queries():
    assert unmatched_queries(catalog_of([1, 2, 1, 4], None)).tolist() == [False, True, False, True]
    assert unmatched_queries(catalog_of([1, 2, 1, 4], [2, 2, 3])).tolist() == [True, False, True, True]


def test_check_ranks():
    check_recall_ks(catalog_of([1, 1, 1], None), (1, 2))
    check_recall_ks(catalog_of([1], [1, 1, 2]), (1, 3))
    for catalog, k in ((catalog_of([1, 1, 1], None), 3), (catalog_of([1], [1, 1, 2]), 4), (catalog_of([1], [1]), 0)):
        with pytest.raises(UserError, match=f"--rank {k}"):
            check_recall_ks(catalog, (1, k))


def test_existence_scans_folders_instead_of_files(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{c}/{i}.jpg" for c in range(3) for i in range(50)))
    paths = [str(tmp_path / f"{c}/{i}.jpg") for c in range(4) for i in range(50)]
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    monkeypatch.setattr(os, "stat", lambda *a, **k: pytest.fail("a stat per image"))
    absent = missing(paths)
    monkeypatch.undo()
    assert absent == list(range(150, 200)) and len(scanned) == 4


def test_warnings_are_one_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastirt"):
        load_dataset("cub200", str(cub(tmp_path)))
    assert caplog.records and all("\n" not in record.getMessage() for record in caplog.records)
