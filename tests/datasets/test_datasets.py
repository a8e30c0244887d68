"""Every data set: unmatched queries, the K of Recall@K, missing files; and the demo set."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastirt.datasets import Catalog, Split, check_recall_ks, load_dataset, unmatched_queries
from fastirt.datasets.listing import missing
from fastirt.errors import UserError
from tests.datasets.files import refusal, touch


def test_a_folder_is_a_demo_set_by_its_json_file(tmp_path):
    assert "fastirt demo OUT" in refusal("demo", tmp_path / "none")
    touch(tmp_path, "train/a/1.jpg", "test/b/1.jpg", "test/b/2.jpg")
    assert "fastirt demo OUT" in refusal("demo", tmp_path)
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 0}))
    catalog = load_dataset("demo", str(tmp_path))
    assert catalog.dataset == "demo" and (len(catalog.train), len(catalog.query)) == (1, 2)
    (tmp_path / "demo.json").write_text("{half")
    assert "demo.json" in refusal("demo", tmp_path)


def test_unknown_dataset():
    assert "use one of cub200" in refusal("cars196", Path("/"))


def catalog_of(query: list[int], gallery: list[int] | None) -> Catalog:
    def split(name: str, labels: list[int]) -> Split:
        return Split(name, tuple(f"/d/{name}{i}" for i in range(len(labels))), np.array(labels, dtype=np.int64))

    train, others = split("train", [0]), None if gallery is None else split("gallery", gallery)
    return Catalog("csv", "/d", train, split("test" if others is None else "query", query), others, tuple("abcde"))


def test_queries_of_no_other_image_are_unmatched():
    assert unmatched_queries(catalog_of([1, 2, 1, 4], None)).tolist() == [False, True, False, True]
    assert unmatched_queries(catalog_of([1, 2, 1, 4], [2, 2, 3])).tolist() == [True, False, True, True]


def test_a_k_above_the_gallery_is_refused():
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
