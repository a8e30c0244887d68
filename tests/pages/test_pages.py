"""The pages of `fastirt report --html` and of searches, as files and in a real browser."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fastirt.config.options import Config
from fastirt.pages.report.findings import compare, confusions, doubles, doubtful_labels, failures, hubs
from fastirt.pages.report.image_map import _layout
from fastirt.pages.report.neighbors import Neighbors
from fastirt.pages.search_page import write_search_page
from tests.helpers import folder_flags, last_line, read_metrics, run_cli, train_tiny, write_images, write_splits
from tests.pages.browser import BACKGROUND, BROKEN_IMAGES, OVERFLOW, PHONE, browser, needs_chromium  # noqa: F401

ODD = "<img src=x onerror=alert(1)> & \"q\" 'a'"

SECOND = "<b>second" + 60 * "x"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of two runs on 1,000 queries of 100 classes, one of them of an odd name."""
    root = tmp_path_factory.mktemp("large")
    data = write_splits(root / "data", (2, 2), (100, 10))
    (data / "test" / "class07").rename(data / "test" / ODD)
    (data / "test" / ODD / "3.jpg").rename(data / "test" / ODD / "\udcff'$x$\".jpg")
    runs = [root / "first", root / SECOND]
    for seed, run in enumerate(runs):
        assert train_tiny(data, run, *"--method irt-o --max-iter 0 --rank 1 2 4 --seed".split(), seed) == 0
        rows = [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 1000)]
        rows += [{"step": step, "recall@1": step / 2000} for step in (500, 1000)]
        (run / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 10')
    page = root / "page.html"
    assert run_cli("report", *runs, "--html", page) == 0
    return page


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The page of a search with a missing, a broken and an oddly named file."""
    root = tmp_path_factory.mktemp("found")
    write_images(root, 1, 3)
    broken, odd = root / "broken.jpg", str(root / "\udcff<script>.jpg")
    broken.write_bytes(b"no image")
    Image.new("L", (5, 200), 77).save(odd, "PNG")
    matches = [
        ("<script>alert(1)</script>", str(root / "class00/1.jpg"), 0.9, {"brand": "<b>x", "n": 3}),
        ("broken", str(broken), 0.8, {}),
        ("gone", str(root / "gone.jpg"), 0.7, {}),
        (odd, odd, -0.1, {}),
    ]
    page = root / "page.html"
    rest = [("further", None, [("a", None, 0.5, {})] * 20)] * 998
    write_search_page(page, "<Title> & more", [("one", str(root / "class00/0.jpg"), matches), ("two", None, []), *rest])
    return page


def test_names_are_escaped(large, found):
    for page in (large.read_text(), found.read_text()):
        assert not re.search(r"<script|<img src=x|<b>(second|x)|onerror=alert\(1\)>", page)
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &#34;q&#34;" in large.read_text()
    assert "\\udcff&lt;script&gt;" in found.read_text() and "brand: &lt;b&gt;x" in found.read_text()


def test_a_report_says_what_it_shows(large):
    page = large.read_text()
    assert large.stat().st_size < 10e6
    assert "1,000 queries of 100 classes" in page and "30 of " in page and "of at most" in page
    for name in ("first", SECOND.replace("<", "&lt;").replace(">", "&gt;")):
        value = re.search(rf'<div class="name">{name}</div>.*?<div class="value">([\d.]+) %', page, re.DOTALL)[1]
        run = large.parent / name.replace("&lt;", "<").replace("&gt;", ">")
        assert value == f"{100 * read_metrics(run)['recall@1']:.2f}"
    won, lost, both, neither = map(int, re.findall(r"<li><b>([\d,]+)</b> (?:won|lost|both)", page))
    best, other = sorted((100 * read_metrics(large.parent / run)["recall@1"] for run in ("first", SECOND)))[::-1]
    assert won + lost + both + neither == 1000 and (won + both) / 10 == pytest.approx(best)
    assert (lost + both) / 10 == pytest.approx(other)
    failed = int(re.search(r"A table of all (\d+) failures", page)[1])
    assert failed == round(1000 - 10 * best) == page.count("</td></tr>\n") - 2
    assert "metrics.json has" not in page  # the ranks on the page are those of the evaluation


def test_a_search_page_lists_what_it_does_not_show(found):
    page = found.read_text()
    shown = page.count('<section id="q')
    assert page.count("<img") <= 1200 and shown + page.count("<dt>further</dt>") == 1000
    assert f"those of the first {shown} queries" in page and f"for the other {1000 - shown} is" in page


@needs_chromium
@pytest.mark.parametrize("name", ["large", "found"])
def test_in_a_browser(name, request, browser):  # noqa: F811
    page = request.getfixturevalue(name)
    seen = browser.open(page)
    assert (seen.messages, seen.requests) == ([], [])
    assert seen.seconds < 2 or browser.open(page).seconds < 2  # other tests may take the CPUs for a moment
    assert browser.evaluate("document.images.length") > 4 and browser.evaluate(BROKEN_IMAGES) == 0
    assert browser.evaluate(OVERFLOW) <= 0
    charts = browser.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getAttribute('aria-label'))")
    assert all(charts) and (name == "found" or len(charts) >= 6)
    anchors = "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href')))"
    assert browser.evaluate(f"{anchors}.length") == 0
    light = browser.evaluate(BACKGROUND)
    seen = browser.open(page, PHONE, "dark")
    assert (seen.messages, seen.requests) == ([], [])
    assert browser.evaluate(OVERFLOW) <= 0 and browser.evaluate(BACKGROUND) != light


def test_runs_without_images_or_model(trained_run, image_folder, tmp_path, capsys, monkeypatch):
    """Moved images: metrics and curves, a note, and --data-path. A folder with metrics alone."""
    moved, page = tmp_path / "moved", tmp_path / "page.html"
    config = (trained_run / "config.json").read_text()
    (trained_run / "config.json").write_text(config.replace(str(image_folder), str(tmp_path / "old")))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained_run / "metrics.json", bare)
    assert run_cli("report", trained_run, bare, "--html", page) == 0
    text = page.read_text()
    assert "bare has metrics alone" in text and str(tmp_path / "old") in text and "--data-path" in text
    assert 'id="training"' in text and 'id="failures"' not in text
    shutil.copytree(image_folder, moved)
    (moved / "test" / "class00" / "0.jpg").write_bytes(b"no image")
    assert run_cli("report", trained_run, bare, "--html", page, "--data-path", moved) == 0
    assert 'id="failures"' in page.read_text() and "some were changed since" in page.read_text()
    assert run_cli("report", trained_run, "--html", page, "--data-path", tmp_path / "nowhere") == 2
    assert "nowhere" in last_line(capsys)


def test_runs_of_one_name_and_other_images_are_not_compared_by_query(trained_run, image_folder, tmp_path):
    """A query with fewer images to be taken for is won by any model."""
    images, run, page = tmp_path / "images", tmp_path / "other" / trained_run.name, tmp_path / "page.html"
    shutil.copytree(image_folder, images)
    (images / "test" / "class00" / "0.jpg").unlink()
    shutil.copytree(trained_run, run)
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(str(image_folder), str(images)))
    assert run_cli("report", trained_run, run, "--html", page) == 0
    text = page.read_text()
    assert "They were evaluated on different images" in text and "sign test" not in text
    assert text.count('<tr class="best"><td>') == 1 and f"<td>other/{run.name}</td>" in text


def test_published_rows_and_an_unfinished_run(tmp_path):
    """Of cub200, whose images are not here: rows of the paper below those of the runs."""
    runs = [tmp_path / "done", tmp_path / "unfinished"]
    config = {"config": Config().replace(dataset="cub200", data_path=str(tmp_path / "cub")).to_dict()}
    for run in runs:
        run.mkdir()
        (run / "config.json").write_text(json.dumps(config))
    (runs[0] / "metrics.json").write_text(json.dumps({"recall@1": 0.5, "recall@2": 0.6, "map@r": 0.2}))
    assert run_cli("report", *runs, "--html", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "not evaluated yet" in page and page.count("neither neighbors nor embeddings") == 2
    assert "El-Nouby et al. 2021: DeiT-S distilled" in page and "82.9" in page and "50.00 %" in page


def test_a_tiny_data_set_in_a_packed_store(tmp_path):
    """Two classes of two images, and a query that no image of the gallery can answer."""
    data, store, run = write_splits(tmp_path / "data", (2, 2), (2, 2)), tmp_path / "store.bin", tmp_path / "run"
    (data / "test" / "alone").mkdir()
    shutil.copy(data / "test" / "class00" / "0.jpg", data / "test" / "alone")
    size = ["--input-size", 16, "--resize-size", 18]
    assert run_cli("pack", store, *folder_flags(data), *size, "--workers", 1) == 0
    flags = "--method irt-o --max-iter 0 --rank 1 --packed".split()
    assert train_tiny(data, run, *flags, store) == 0
    assert run_cli("report", run, "--html", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "5 queries of 3 classes" in page and "1.00" in page and "labeled wrongly" in page


def test_refusals(finished_run, tmp_path, capsys):
    for flags, said in (
        (["--html", tmp_path], "is a folder"),
        (["--html", tmp_path / "a" / "b.html"], str(tmp_path / "a")),
        (["--data-path", tmp_path], "--html"),
    ):
        assert run_cli("report", finished_run, *flags) == 2
        assert said in last_line(capsys)


def _neighbors(labels, rows, similarity, first_rank):
    labels, rows = np.array(labels), np.array(rows)
    size = len(labels)
    first = np.zeros(size, np.int64), np.zeros(size)
    return Neighbors(np.arange(size), labels, labels, rows, np.array(similarity), np.array(first_rank), *first)


def test_findings():
    """Five images of classes 0, 0, 1, 1, 2, each other's neighbors; the last has no match."""
    rows = [[1, 2], [0, 2], [0, 3], [0, 2], [0, 1]]
    similarity = [[0.99, 0.5], [0.99, 0.6], [0.7, 0.6], [0.9, 0.8], [0.4, 0.3]]
    found = _neighbors([0, 0, 1, 1, 2], rows, similarity, [1, 1, 2, 2, np.nan])
    assert failures(found).tolist() == [3, 2]  # of equal ranks the more similar mistake first
    pairs, total = confusions(found, 5)
    assert total == 1 and pairs[0] == ((0, 1), 2, 4, 3)
    assert doubles(found, same_split=True) == [(0, 0)] and doubles(found, same_split=False) == [(0, 0), (1, 0)]
    assert doubtful_labels(found) == []
    top, mean = hubs(found, 3)
    assert mean == 2 and [(hub.row, hub.times, hub.wrong) for hub in top] == [(0, 4, 3), (2, 3, 2)]
    other = _neighbors([0, 0, 1, 1, 2], rows, similarity, [2, 1, 1, 3, np.nan])
    result = compare(found, other, (list("abcde"), list("abcde")))
    assert (result.won, result.lost, result.both, result.neither) == ([(0, 0)], [(2, 2)], 1, 1)
    assert result.p_value == 1


@pytest.mark.parametrize("different", [0, 1])
def test_places_of_equal_embeddings(different):
    """A collapsed model's embeddings, with which t-SNE crashed."""
    vectors = np.ones((40, 8), np.float32)
    vectors[:different, 0] += 0.01
    places = _layout(vectors)
    assert places.shape == (40, 2) and np.isfinite(places).all()


def test_doubtful_labels():
    labels = [0] * 6 + [1]
    rows = [[r for r in range(7) if r != query][:5] for query in range(7)]
    found = _neighbors(labels, rows, np.full((7, 5), 0.5), [1.0] * 6 + [np.nan])
    assert doubtful_labels(found) == [6]
