"""`fastirt index` and `fastirt search`, and a Gallery of a real model."""

import json
import shutil

import numpy as np
import pytest

import fastirt
from fastirt.cli.gallery import table
from fastirt.errors import UserError
from fastirt.gallery import Neighbors
from tests.helpers import TINY, last_line, run_cli


@pytest.fixture(scope="module")
def shop(finished_run, image_folder, tmp_path_factory):
    """A gallery of the test images, with one file that is no image."""
    images = tmp_path_factory.mktemp("images") / "test"
    shutil.copytree(image_folder / "test", images)
    (images / "class00" / "broken.jpg").write_text("no image")
    folder = tmp_path_factory.mktemp("galleries") / "shop"
    assert run_cli("index", finished_run, images, folder) == 0
    return images, folder


def search(capsys, *words) -> dict:
    capsys.readouterr()
    assert run_cli("search", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_index_names_what_is_left_out_and_missing(shop, finished_run, tmp_path, capsys):
    images, _ = shop
    assert run_cli("index", finished_run, images / "class00", tmp_path / "one") == 0
    assert "left out, since unreadable: 1" in capsys.readouterr().out
    assert run_cli("index", finished_run, images / "nosuch", tmp_path / "two") == 2
    assert "nosuch: no such folder or file" in last_line(capsys)


def test_json(shop, finished_run, capsys):
    images, folder = shop
    query = images / "class01" / "2.jpg"
    found = search(capsys, folder, query, "-k", 3)
    assert list(found) == ["gallery", "images", "k", "where", "exact", "queries"]
    assert (found["images"], found["k"], found["where"], found["exact"]) == (24, 3, [], True)
    result = found["queries"][0]
    assert list(result) == ["query", "error", "neighbors"] and result["query"] == str(query) and result["error"] is None
    first = result["neighbors"][0]
    assert first.pop("similarity") == pytest.approx(1, abs=1e-6)
    assert first == {"rank": 1, "path": "class01/2.jpg", "file": str(query), "metadata": {}}
    model = fastirt.load(finished_run)
    listed = sorted(images.rglob("[0-9].jpg"))
    similarities = model.encode(listed) @ model.encode(query)[0]
    nearest = [str(listed[row]) for row in np.argsort(-similarities, kind="stable")[:3]]
    assert [neighbor["file"] for neighbor in result["neighbors"]] == nearest


def test_table_page_and_unreadable_queries(shop, tmp_path, capsys):
    images, folder = shop
    page = tmp_path / "page.html"
    broken = images / "class00" / "broken.jpg"
    assert run_cli("search", folder, images / "class00/1.jpg", broken, "-k", 2, "--html", page) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].split() == ["1", "1.0000", "class00/1.jpg"] and len(lines) == 4
    assert lines[3].startswith(str(broken)) and str(broken) in err
    assert page.read_text().count("<img") == 4  # one of them says that there is no image


def test_csv_of_paths_that_do_not_lead_to_the_files(finished_run, image_folder, tmp_path):
    (tmp_path / "img").symlink_to(image_folder / "test/class00")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "list.csv").write_text("path\n../img/0.jpg\n./../img/1.jpg\n..\\img\\2.jpg\n")
    for store in ("files", "lancedb"):
        gallery = fastirt.Gallery.build(finished_run, tmp_path / "csv" / "list.csv", tmp_path / store, store=store)
        found = gallery.search(tmp_path / "img/1.jpg", 3)[0]
        assert found.paths[0] == "./../img/1.jpg" and found.files[0] == str(tmp_path / "img/1.jpg")
        assert gallery.add(tmp_path / "img/2.jpg") == 1 and len(gallery) == 3


def test_odd_names_are_printed_on_one_line(capsys):
    found = Neighbors(["a\x1b[31m\udcff.jpg"], np.ones(1, np.float32), [{"x": "1\n2"}], [None], "q\n")
    assert table([found]) == "q\\n\n    1  1.0000  a\\x1b[31m\\udcff.jpg  x=1\\n2"


def test_csv_with_metadata(finished_run, image_folder, tmp_path, capsys):
    rows = [f"{image_folder}/test/class0{i // 4}/{i % 4}.jpg,b{i % 3},{i}" for i in range(8)]
    (tmp_path / "list.csv").write_text("\n".join(["path,brand,price", *rows]))
    folder = tmp_path / "shop"
    flags = ["--kind", "HNSW8", "--parquet", tmp_path / "shop.parquet"]
    assert run_cli("index", finished_run, tmp_path / "list.csv", folder, *flags) == 0
    out = capsys.readouterr().out
    assert "metadata: brand, price" in out and "HNSW8: recall@7 1.0000" in out and "bytes a vector" in out
    assert (tmp_path / "shop.parquet").is_file()
    found = search(capsys, folder, f"{image_folder}/test/class00/0.jpg", "--where", "brand=b1", "--where", "price>1")
    assert [row["metadata"]["price"] for row in found["queries"][0]["neighbors"]] in (["4", "7"], ["7", "4"])
    assert run_cli("index", finished_run, image_folder / "test/class05", folder, "--add") == 0
    assert "added 4 images" in capsys.readouterr().out and len(fastirt.Gallery.open(folder)) == 12


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere", "x.jpg"], "nowhere: no such gallery"),
        (["{folder}", "x.jpg", "--where", "brand=x"], "no metadata column 'brand' for --where; it has: none"),
        (["{folder}", "x.jpg", "-k", "0"], "k = 0"),
        (["{folder}", ""], "empty name"),
        (["{folder}", "x.jpg", "--device", "cuda:99"], "no such device; present:"),
    ],
)
def test_refused_searches(shop, capsys, words, message):
    assert run_cli("search", *(word.format(folder=shop[1]) for word in words)) == 2
    assert message in last_line(capsys)


def test_another_model_is_refused(shop, finished_run, image_folder, capsys, tmp_path):
    images, folder = shop
    same = fastirt.load(finished_run)
    assert len(fastirt.Gallery.open(folder, same)) == 24
    for options in ({"resize_size": 20}, {"pooling": "mean"}):
        with pytest.raises(UserError, match=f"{folder}: its vectors are of a model with other weights or preproc"):
            fastirt.Gallery.open(folder, fastirt.load(finished_run, options=options))
    model_and_flags = [TINY[1], *TINY[2 : TINY.index("--num-workers")]]
    assert run_cli("index", *model_and_flags, images, folder, "--add") == 2
    assert "other weights or preprocessing" in last_line(capsys) and len(fastirt.Gallery.open(folder)) == 24


def test_python(shop, finished_run, tmp_path):
    images, folder = shop
    bad = []
    gallery = fastirt.Gallery.build(
        finished_run, images / "class00", tmp_path / "own", on_bad=lambda *args: bad.append(args)
    )
    assert len(gallery) == 4 and bad[0][1].endswith("broken.jpg")
    assert gallery.add([images / "class01/0.jpg", images / "class00/2.jpg"]) == 2 and len(gallery) == 5
    moved = shutil.move(tmp_path / "own", tmp_path / "moved")
    found = fastirt.Gallery.open(moved).search(images / "class01/0.jpg", k=2)
    assert found[0].files[0] == str(images / "class01/0.jpg") and found[0].similarities[0] > 0.99999
    assert gallery.columns == [] and fastirt.Gallery.open(moved).remove(images / "class00/2.jpg") == 1
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        fastirt.Gallery.build(gallery.model, images / "class00/broken.jpg", tmp_path / "none", on_bad=print)
    assert not (tmp_path / "none").exists()
