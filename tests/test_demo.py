"""The demo set: the same bytes for the same arguments, whole or not at all, and no colour puzzle."""

import json

import numpy as np
import pytest
from PIL import Image

from fastirt.catalog import load_catalog
from fastirt.demo import generate as generate_module
from fastirt.demo.baseline import colour_histogram
from fastirt.demo.generate import generate
from fastirt.demo.product import make_product
from fastirt.demo.scene import take_photo
from fastirt.errors import UserError

SMALL = dict(classes=6, views=3, width=48, height=40, progress=False)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_bytes_for_any_number_of_workers_and_others_for_another_seed(tmp_path):
    one, two = generate(tmp_path / "one", workers=1, **SMALL), generate(tmp_path / "two", workers=2, **SMALL)
    assert contents(one) == contents(two) and len(contents(one)) == 6 * 3 + 1
    other = generate(tmp_path / "other", workers=1, seed=1, **SMALL)
    assert not set(contents(one).values()) & set(contents(other).values())
    with Image.open(one / "train/product00000/0000.jpg") as picture:
        assert picture.size == (48, 40)
    pictures = [data for name, data in contents(one).items() if name.endswith("jpg")]
    assert len(set(pictures)) == len(pictures)


def test_it_is_a_data_set_with_unseen_classes(tmp_path):
    catalog = load_catalog("demo", str(generate(tmp_path / "demo", workers=1, **SMALL)))
    assert len(catalog.train) == 12 and len(catalog.query) == 6 and catalog.gallery is None
    assert not set(catalog.train.labels) & set(catalog.query.labels)


def test_an_existing_set_is_used_again_and_anything_else_refused(tmp_path):
    out = generate(tmp_path / "demo", workers=1, **SMALL)
    before = (out / "demo.json").stat().st_mtime_ns
    assert generate(out, workers=1, **SMALL) == out and (out / "demo.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another demo set .*classes 6"):
        generate(out, workers=1, **{**SMALL, "classes": 8})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UserError, match="no demo set"):
        generate(tmp_path / "mine", workers=1, **SMALL)
    for wrong in (dict(classes=1), dict(views=1), dict(width=4), dict(seed=-1)):
        with pytest.raises(UserError, match="--"):
            generate(tmp_path / "wrong", workers=1, **{**SMALL, **wrong})


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


def test_large_pictures_weigh_what_photographs_do():
    import io

    sizes = []
    for number in range(12):
        product = make_product(0, number)
        for view in range(2):
            data = io.BytesIO()
            take_photo(product, 0, number, view, 500, 375).save(data, "JPEG", quality=82, subsampling=0)
            sizes.append(len(data.getvalue()))
    assert 60_000 < np.mean(sizes) < 120_000


def test_neighbouring_classes_share_palette_or_silhouette():
    products = [make_product(3, number) for number in range(4)]
    outlines = [np.asarray(p.front)[..., 3] for p in products]
    assert np.array_equal(products[0].palette, products[1].palette) and not np.array_equal(products[1].palette, products[2].palette)
    assert np.array_equal(outlines[1], outlines[2]) and not np.array_equal(outlines[0], outlines[1])
    assert not np.array_equal(np.asarray(products[0].front), np.asarray(products[1].front))


def test_colour_histogram(tmp_path):
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (30, 10), (250, 5, 3)).save(tmp_path / "reddish.png")
    Image.new("RGB", (20, 20), (0, 0, 255)).save(tmp_path / "blue.png")
    vectors = colour_histogram([str(tmp_path / f"{name}.png") for name in ("red", "reddish", "blue")])
    np.testing.assert_allclose(vectors @ vectors.T, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)
    assert vectors.dtype == np.float32


def test_baseline_writes_metrics(tmp_path):
    from fastirt.demo.baseline import main

    main(str(generate(tmp_path / "demo", classes=12, views=4, width=32, height=32, workers=1, progress=False)), str(tmp_path / "out"))
    assert 0 < json.loads((tmp_path / "out/metrics.json").read_text())["recall@1"] <= 1
