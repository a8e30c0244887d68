"""CSV lists as other programs write them."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from fastirt.datasets import load_dataset
from tests.datasets.files import refusal, rows, touch

FILES = [f"{label}/{i}.jpg" for label in "abcd" for i in (1, 2)]


ROWS = "path,label,split\n" + "".join(f"{f},{f[0]},{'train' if f[0] in 'ab' else 'test'}\n" for f in FILES)


OML = (
    "label,path,split,is_query,is_gallery,x_1,x_2,y_1,y_2\na,a/1.jpg,train,,,,,,\nb,b/1.jpg,train,nan,False,,,,\n"
    "c,c/1.jpg,validation,True,True,,,,\nc,c/2.jpg,validation,1,1,,,,\nd,d/1.jpg,validation,True,False,,,,\n"
    "d,d/2.jpg,validation,False,True,,,,\n"
)


def write(root: Path, text: str | bytes, encoding: str = "utf-8", files=FILES) -> None:
    touch(root, *files)
    (root / "split.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))


def load(root: Path, text: str | bytes, encoding: str = "utf-8", files=FILES, **kwargs):
    write(root, text, encoding, files)
    return load_dataset("csv", str(root), **kwargs)


def error(root: Path, text: str | bytes, encoding: str = "utf-8", files=FILES, **kwargs) -> str:
    write(root, text, encoding, files)
    message = refusal("csv", root, **kwargs)
    assert "split.csv" in message
    return message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_and_encodings(tmp_path, delimiter, encoding):
    catalog = load(tmp_path, ROWS.replace(",", delimiter).replace("\n", "\r\n"), encoding)
    assert [os.path.relpath(p, tmp_path) for p in catalog.train.paths + catalog.query.paths] == FILES
    assert catalog.class_names == tuple("abcd")


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\r\n" + ROWS.replace(",", ";"),
        '"sep=\t"\n' + ROWS.replace(",", "\t"),
        "sep=|\n" + ROWS.replace(",", "|"),
        ROWS.replace("\n", "\r"),
        ROWS.replace("\n", ",\n"),
        ROWS.replace("train\n", "train,\n"),
        ROWS.replace("split\n", "split,\n"),
        ROWS.replace("a/", "a\\"),
        ROWS.replace("train", "Training ").replace("test", "TESTING"),
    ],
)
def test_what_other_programs_write(tmp_path, text):
    catalog = load(tmp_path, text)
    assert len(catalog.train) == len(catalog.query) == 4 and catalog.query.name == "test"


@pytest.mark.parametrize("disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_unicode_form(tmp_path, disk, written):
    name = "é/ü 1.jpg"
    catalog = load(
        tmp_path,
        ROWS.replace("a/1.jpg", unicodedata.normalize(written, name)),
        files=[*FILES, unicodedata.normalize(disk, name)],
    )
    assert os.path.isfile(catalog.train.paths[0])


def test_labels_that_look_alike_are_one(tmp_path):
    text = ROWS.replace("c/1.jpg,c", "c/1.jpg,\u00e9  x").replace("c/2.jpg,c", "c/2.jpg, e\u0301\u00a0x")
    assert load(tmp_path, text).class_names == ("a", "b", "\u00e9 x", "d")
    assert load(tmp_path, ROWS.replace(",c,", ",01,").replace(",d,", ",1,")).class_names[2:] == ("01", "1")


def test_lists_of_open_metric_learning_are_read(tmp_path, caplog):
    catalog = load(tmp_path, OML)
    query, gallery = ([os.path.relpath(p, tmp_path) for p in s.paths] for s in (catalog.query, catalog.gallery))
    assert query == ["c/1.jpg", "c/2.jpg", "d/1.jpg"]
    assert gallery == ["c/1.jpg", "c/2.jpg", "d/2.jpg"]
    assert catalog.own.tolist() == [0, 1, -1] and "boxes" not in caplog.text
    load(tmp_path, OML.replace("True,False,,,,", "True,False,1,2,3,4"))
    assert "x_1, x_2, y_1, y_2" in caplog.text


def test_a_query_in_the_gallery_by_a_linked_alias(tmp_path):
    text = (
        ROWS.replace("test", "query")
        + "link/1.jpg,c,gallery\nc/2.jpg,c,gallery\nd/1.jpg,d,gallery\nd/2.jpg,d,gallery\n"
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "link").symlink_to("c")
    assert load(tmp_path, text).own.tolist() == [0, 1, 2, 3]


def test_an_alias_in_one_split_counts_once(tmp_path, caplog):
    (tmp_path / "c").mkdir()
    (tmp_path / "link").symlink_to("c")
    assert len(load(tmp_path, ROWS + "link/1.jpg,c,test\n").query) == 4
    assert "row 10 'link/1.jpg' is row 6 'c/1.jpg'" in caplog.text


def test_commands_and_the_splits_that_they_need(tmp_path, caplog):
    head, *lines = ROWS.splitlines(True)
    train, test = head + "".join(lines[:4]), head + "".join(lines[4:])
    assert load(tmp_path, train).query is None and "evaluation is skipped" in caplog.text
    assert "the split test is missing (found: train)" in error(tmp_path, train, training=False)
    assert "the split train is missing (found: test)" in error(tmp_path, test)
    for training in (False, None):
        assert load(tmp_path, test, training=training).train is None
    both = ROWS + "e/1.jpg,e,val\ne/2.jpg,e,val\nf/1.jpg,f,val\nf/2.jpg,f,val\n"
    files = [*FILES, "e/1.jpg", "e/2.jpg", "f/1.jpg", "f/2.jpg"]
    assert load(tmp_path, both, files=files).query.name == "test"
    assert load(tmp_path, both, files=files, eval_split="val").query.name == "val"


@pytest.mark.parametrize(
    "text, expected",
    [
        (ROWS.replace("b,train", "b\0,train"), "row 4: holds a NUL byte"),
        (ROWS.replace("c/1", "é/1").encode("latin-1"), "row 6: not UTF-8 text"),
        (b"PK\3\4" + bytes(range(256)), "a workbook or an archive"),
        (ROWS.replace("label", "path"), "row 1: no column label"),
        (ROWS.replace("split\n", "split,label\n"), "row 1: 2 columns are called label"),
        (ROWS.replace("a/1", "A/1"), "row 2: no file 'A/1.jpg' under "),
        (ROWS.replace("a/1", "A/1"), "'a/1.jpg' exists"),
        (ROWS.replace("a/1", "x\\1"), "write / between folders"),
        (ROWS + "c/1.jpg,c,test\n", "row 10: 'c/1.jpg' is listed in row 6 already"),
        (ROWS.replace(",d,", ",c,"), "the test split has one class only (c)"),
        ("sep=;\n" + ROWS.replace(",", ";").replace("d/2", "d/9"), "row 10: no file 'd/9.jpg'"),
        (OML.replace("True,False", "False,"), "row 6: neither is_query nor is_gallery"),
        (OML.replace("True,False", "si,False"), "row 6: is_query is 'si'"),
        (OML.replace("nan,False", "True,False"), "row 3: a training row has is_query"),
        (OML.replace("is_gallery", "g"), "no column is_gallery"),
    ],
)
def test_errors_name_row_and_remedy(tmp_path, text, expected):
    assert expected in error(tmp_path, text)


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
    assert catalog.gallery.name == "gallery"
    assert len(catalog.gallery) == 2
    assert len(catalog.query) == 1
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
    assert expected in refusal("csv", write_csv(tmp_path, text))


def test_csv_encoding_and_absence(tmp_path):
    write_csv(tmp_path, GOOD, "latin-1")
    assert "split.csv: row 5: not UTF-8" in refusal("csv", tmp_path)
    assert "none.csv: cannot be read" in refusal("csv", tmp_path / "none.csv")
    (tmp_path / "split.csv").unlink()
    assert "path,label,split" in refusal("csv", tmp_path)
