"""`--per-query`: a row for each query, as CSV and Parquet, or one line that says why not."""

import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from fastirt.datasets import Catalog, Split, load_dataset
from fastirt.errors import UserError
from fastirt.retrieval.evaluate import evaluate
from fastirt.retrieval.metrics.per_query_file import check_per_query_file, per_query_table, write_per_query_file
from fastirt.retrieval.positives import UNRANKED
from tests.helpers import write_images
from tests.retrieval.test_evaluate import CONFIG, CPU, Pixels
from tests.retrieval.test_per_query import made_up

COLUMNS = ["query", "row", "label", "first_rank", "first_positive", "r", "ap", "ap@r"]
QUERY = Split("query", ("/d/a,1.jpg", "/d/lost.jpg", "/d/b\n.jpg", "/d/\udcff.jpg"), np.array([0, 1, 1, 0]))
GALLERY = Split("gallery", ("/g/0.jpg", "/g/lost.jpg", "/g/2.jpg", "/g/3.jpg"), np.array([0, 0, 0, 1]))


def written(path, ranks):
    rows = torch.tensor([0, 2, 3])
    write_per_query_file(path, [per_query_table(ranks, QUERY, rows, GALLERY, rows, ("cup", "lamp"))])
    return path


def rows_of(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_rows_of_csv(tmp_path):
    """Unreadable images have no row; what a query lacks is empty; odd names come back."""
    ranks = made_up([1, 3], [], [2])  # gallery rows 0 and 2; none; 1
    first, second, third = rows_of(written(tmp_path / "q.csv", ranks))
    assert list(first) == COLUMNS
    assert list(first.values())[:6] == ["/d/a,1.jpg", "0", "cup", "1", "/g/0.jpg", "2"]
    assert (float(first["ap"]), float(first["ap@r"])) == (pytest.approx(5 / 6), 1 / 2)
    assert list(second.values()) == ["/d/b\n.jpg", "2", "lamp", "", "", "0", "", ""]
    assert (third["query"], third["row"], third["first_positive"], third["ap"]) == (
        "/d/\udcff.jpg",
        "3",
        "/g/2.jpg",
        "0.5",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["q.csv"]


def test_a_ranking_to_a_depth_leaves_empty_what_is_deeper(tmp_path):
    ranks = made_up([1, UNRANKED], [2], [UNRANKED], depth=2)._replace(rows=torch.tensor([0, 2, 1, 2]))
    rows = rows_of(written(tmp_path / "q.csv", ranks))
    assert [row["first_rank"] for row in rows] == ["1", "2", ""] and rows[2]["first_positive"] == ""
    assert [row["ap"] for row in rows] == ["", "0.5", ""] and [row["ap@r"] for row in rows] == ["0.5", "0.0", "0.0"]


def test_parquet_has_the_same_rows(tmp_path):
    table = parquet.read_table(written(tmp_path / "q.PARQUET", made_up([1, 3], [], [2])))
    assert table.column_names == COLUMNS
    assert table.column("first_rank").to_pylist() == [1, None, 2]
    assert table.column("query").to_pylist() == ["/d/a,1.jpg", "/d/b\n.jpg", "/d/\\udcff.jpg"]
    kinds = {field.name: str(field.type) for field in table.schema}
    assert (kinds["r"], kinds["first_rank"], kinds["ap"], kinds["label"]) == ("int64", "int64", "double", "string")


def test_files_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # import fails
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "folder.csv").mkdir()
    for name, reason in (
        ("q.txt", r"\.csv or \.parquet"),
        ("q", r"\.csv or \.parquet"),
        ("q.parquet", "pip install pyarrow"),
        ("none/q.csv", "No such file or directory"),
        ("folder.csv", "folder"),
        ("x" * 300 + ".csv", "name too long"),
    ):
        with pytest.raises(UserError, match=f"--per-query .*{reason}") as caught:
            check_per_query_file(tmp_path / name)
        assert "\n" not in str(caught.value)
    check_per_query_file(tmp_path / "q.csv")
    check_per_query_file(None)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]
    with pytest.raises(UserError, match="none/q.csv: cannot be written"):
        written(tmp_path / "none/q.csv", made_up([1], [2], [3]))


def test_evaluation_writes_what_its_metrics_are_means_of(tmp_path):
    write_images(tmp_path / "train", 2, 2)
    write_images(tmp_path / "test", 5, 4, seed=1)
    (tmp_path / "test/class03/2.jpg").write_bytes(b"not an image")
    catalog, out = load_dataset("folder", str(tmp_path)), tmp_path / "q.csv"
    metrics = evaluate(Pixels(), catalog, CONFIG, CPU, per_query=out, progress=False)
    rows = rows_of(out)
    assert len(rows) == 19 == metrics["queries"] and sorted({row["r"] for row in rows}) == ["2", "3"]
    assert metrics["recall@1"] == pytest.approx(sum(row["first_rank"] == "1" for row in rows) / 19)
    assert metrics["map@r"] == pytest.approx(sum(float(row["ap@r"]) for row in rows) / 19)
    assert metrics["map"] == pytest.approx(sum(float(row["ap"]) for row in rows) / 19)
    for row in rows:
        assert catalog.query.paths[int(row["row"])] == row["query"] != row["first_positive"]
        assert row["label"] in row["query"] and row["label"] in row["first_positive"]


def test_nothing_is_embedded_for_a_file_that_cannot_be_written():
    split = Split("test", tuple("abcd"), np.array([0, 0, 1, 1]))
    encoder, catalog = Pixels(), Catalog("csv", "/nowhere", split, split, None, ("a", "b"))
    with pytest.raises(UserError, match="--per-query"):
        evaluate(encoder, catalog, CONFIG, CPU, per_query=Path("rows.json"), progress=False)
    assert not encoder.calls
