"""The demo set: the same bytes for the same arguments, whole or absent, and no colour puzzle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastirt.datasets import load_dataset
from fastirt.demo import baseline
from fastirt.demo import generate as generate_module
from fastirt.demo.baseline import color_histogram
from fastirt.demo.generate import generate
from fastirt.demo.product import make_product
from fastirt.errors import UserError
from tests.helpers import ROOT

SMALL = dict(classes=6, views=3, width=48, height=40, progress=False)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_bytes_for_any_number_of_workers_and_others_for_another_seed(tmp_path):
    one, two = generate(tmp_path / "one", workers=1, **SMALL), generate(tmp_path / "two", workers=2, **SMALL)
    assert contents(one) == contents(two) and len(contents(one)) == 6 * 3 + 1
    other = generate(tmp_path / "other", workers=1, seed=1, **SMALL)
    assert not set(contents(one).values()) & set(contents(other).values())
    with Image.open(one / "train/product00000/0000.jpg") as image:
        assert image.size == (48, 40)
    images = [data for name, data in contents(one).items() if name.endswith("jpg")]
    assert len(set(images)) == len(images)


def test_it_is_a_data_set_with_unseen_classes(tmp_path):
    catalog = load_dataset("demo", str(generate(tmp_path / "demo", workers=1, **SMALL)))
    assert len(catalog.train) == 12
    assert len(catalog.query) == 6
    assert catalog.gallery is None
    assert not set(catalog.train.labels) & set(catalog.query.labels)


def test_an_existing_set_is_used_again_and_anything_else_refused(tmp_path):
    out = generate(tmp_path / "demo", workers=1, **SMALL)
    before = (out / "demo.json").stat().st_mtime_ns
    assert generate(out, workers=1, **SMALL) == out
    assert (out / "demo.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another demo set .*classes 6"):
        generate(out, workers=1, **{**SMALL, "classes": 8})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UserError, match="no demo set"):
        generate(tmp_path / "mine", workers=1, **SMALL)
    for wrong in (dict(classes=1), dict(views=1), dict(width=4), dict(seed=-1), dict(workers=0)):
        with pytest.raises(UserError, match="--"):
            generate(tmp_path / "wrong", **{"workers": 1, **SMALL, **wrong})


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    draw, calls = generate_module._draw_class, []

    def interrupted(task):
        calls.append(task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        draw(task)

    monkeypatch.setattr(generate_module, "_draw_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "demo", workers=1, **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_killed_drawing_is_never_taken_for_a_whole_one(tmp_path):
    out, partial = tmp_path / "demo", tmp_path / ".demo.partial"
    call = f"generate({str(out)!r}, classes=5000, workers=2, progress=False)"
    code = f"from fastirt.demo.generate import generate\nif __name__ == '__main__': {call}"
    (tmp_path / "draw.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(tmp_path / "draw.py")], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: any(partial.rglob("*.jpg")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    assert len(children) >= 2
    # they must not draw into the next attempt
    wait_until(lambda: not any(running(child) for child in children))
    generate(out, workers=1, **SMALL)
    assert len(contents(out)) == 6 * 3 + 1 and not partial.exists()


def running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_large_images_weigh_what_photographs_do(tmp_path):
    large = dict(views=2, width=500, height=375, workers=1, progress=False)
    out = generate(tmp_path / "demo", classes=12, **large)
    images = list(out.rglob("*.jpg"))
    assert 60_000 < np.mean([path.stat().st_size for path in images]) < 120_000
    with Image.open(images[0]) as image:
        assert image.size == (500, 375) and image.mode == "RGB"
    best = generate(tmp_path / "best", classes=2, quality=(95, 95), **large)
    name = "train/product00000/0000.jpg"
    assert (best / name).stat().st_size > (out / name).stat().st_size


def test_colour_helps_but_is_not_enough(tmp_path):
    """50 unseen classes x 8 views: well above chance, and below one half."""
    out = generate(tmp_path / "demo", classes=51, train_classes=1, views=8, workers=1, progress=False)
    split = load_dataset("demo", str(out)).query
    similarities = color_histogram(split.paths) @ color_histogram(split.paths).T
    np.fill_diagonal(similarities, -1)
    assert len(split) == 400
    assert 0.2 < (split.labels[similarities.argmax(1)] == split.labels).mean() < 0.5


def test_neighbouring_classes_share_palette_or_silhouette():
    products = [make_product(3, number) for number in range(4)]
    outlines = [np.asarray(p.front)[..., 3] for p in products]
    assert np.array_equal(products[0].palette, products[1].palette)
    assert not np.array_equal(products[1].palette, products[2].palette)
    assert np.array_equal(outlines[1], outlines[2])
    assert not np.array_equal(outlines[0], outlines[1])
    assert not np.array_equal(np.asarray(products[0].front), np.asarray(products[1].front))


def test_color_histogram(tmp_path):
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (30, 10), (250, 5, 3)).save(tmp_path / "reddish.png")
    Image.new("RGB", (20, 20), (0, 0, 255)).save(tmp_path / "blue.png")
    vectors = color_histogram([str(tmp_path / f"{name}.png") for name in ("red", "reddish", "blue")])
    np.testing.assert_allclose(vectors @ vectors.T, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)
    assert vectors.dtype == np.float32


def test_baseline_writes_metrics(tmp_path):
    demo = generate(tmp_path / "demo", classes=12, views=4, width=32, height=32, workers=1, progress=False)
    baseline.main(str(demo), str(tmp_path / "out"))
    assert 0 < json.loads((tmp_path / "out/metrics.json").read_text())["recall@1"] <= 1
