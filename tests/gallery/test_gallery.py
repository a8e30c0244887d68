"""Galleries of made-up vectors: search, changes, digests, in files and in LanceDB."""

import json
import shutil
import threading

import numpy as np
import pytest

import fastirt
from fastirt.errors import UserError
from fastirt.gallery import Gallery, bundle
from tests.gallery.made_up import COUNT, DIM, made_up, metadata, paths, unit
from tests.helpers import run_python

STORES = ("files", "lancedb")


def expected(query: np.ndarray, k: int, keep=None) -> list[str]:
    """Paths by the definition."""
    similarities = unit(COUNT) @ query
    if keep is not None:
        similarities[~np.asarray(keep)] = -2
    return [f"a/{row}.jpg" for row in np.argsort(-similarities, kind="stable")[:k]]


@pytest.fixture(scope="module", params=STORES)
def gallery(request, tmp_path_factory) -> Gallery:
    return made_up(tmp_path_factory.mktemp("gallery") / "shop", store=request.param)


@pytest.fixture(params=STORES)
def own(request, tmp_path) -> Gallery:
    """A gallery to change."""
    return made_up(tmp_path / "shop", store=request.param)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_search_is_exact(gallery, queries):
    vectors = unit(queries, seed=5)
    for query, found in zip(vectors, gallery.search_vectors(vectors, k=7)):
        assert found.paths == expected(query, 7)
        assert np.allclose(found.similarities, np.sort(unit(COUNT) @ query)[::-1][:7], atol=1e-6)
        rows = [int(path[2:-4]) for path in found.paths]
        assert found.metadata == [{name: values[row] for name, values in metadata(COUNT).items()} for row in rows]
        assert found.files == [f"/images/{path}" for path in found.paths]


@pytest.mark.parametrize(
    "where, keep",
    [
        ("brand=b3", lambda row: row["brand"] == "b3"),
        (["brand!=b3", "price<50"], lambda row: row["brand"] != "b3" and row["price"] < 50),
        ("price>=98.5", lambda row: row["price"] >= 98.5),
        ("price=7", lambda row: row["price"] == 7),
        ("price!=7", lambda row: row["price"] != 7),
        ("price=cheap", lambda row: False),
        ("note=", lambda row: not row["note"]),
        ("note=it's 4", lambda row: row["note"] == "it's 4"),
        ("brand>b4", lambda row: row["brand"] > "b4"),
        ("brand<4", lambda row: False),
        ("price>", lambda row: False),
        ("price<x", lambda row: False),
        ("brand=x' OR '1'='1", lambda row: False),
    ],
)
def test_where(gallery, where, keep):
    columns = metadata(COUNT)
    mask = [keep({name: columns[name][row] for name in columns}) for row in range(COUNT)]
    for query, found in zip(unit(2, 7), gallery.search_vectors(unit(2, 7), 20, where)):
        assert found.paths == expected(query, min(20, sum(mask)), mask)


@pytest.mark.parametrize("store", STORES)
def test_where_of_numbers_as_text_and_large_ids(tmp_path, store):
    columns = {"sku": [9007199254740990 + i for i in range(5)], "size": [" 42", "41", "nan", "43", ""]}
    odd = made_up(tmp_path / "shop", 5, store=store, metadata=columns)
    for where, rows in (
        ("sku=9007199254740993", {3}),
        ("sku>9007199254740992", {3, 4}),
        ("size>41.5", {0, 3}),
        ("size<=41", {1}),
    ):
        assert {int(path[2:-4]) for path in odd.search_vectors(unit(1), 9, where)[0].paths} == rows


def test_refusals_of_a_search(gallery):
    with pytest.raises(UserError, match="row 1 is of length 3: divide it by that"):
        gallery.search_vectors(unit(2) * [[1], [3]])
    for wrong in (unit(2, dim=5), np.full((1, DIM), np.nan, np.float32), np.zeros((1, DIM), int)):
        with pytest.raises(UserError, match="vectors"):
            gallery.search_vectors(wrong)
    with pytest.raises(UserError, match="k = 0"):
        gallery.search_vectors(unit(1), 0)
    with pytest.raises(UserError, match="no metadata column 'size'.*brand, price, note"):
        gallery.search_vectors(unit(1), where="size=3")
    with pytest.raises(UserError, match="without a model"):
        gallery.search(["x.jpg"])


def test_add_and_remove(own):
    assert own.add_vectors(unit(20, 3), paths(20, "new"), metadata={"brand": ["n"] * 20}, root="/images") == 20
    assert len(own) == COUNT + 20 and own.search_vectors(unit(20, 3)[4], 1)[0].paths == ["new/4.jpg"]
    assert own.search_vectors(unit(1), 99, "brand=n")[0].metadata[0] == {"brand": "n", "price": None, "note": None}
    assert own.add_vectors(unit(2, 4), paths(2), root="/images", metadata={"brand": ["again"] * 2}) == 2
    assert len(own) == COUNT + 20  # the rows of the same files are replaced
    assert own.search_vectors(unit(2, 4)[1], 1)[0].metadata[0]["brand"] == "again"
    assert own.remove(["new/4.jpg", "/images/a/5.jpg", "a/5.jpg"]) == 2 and len(own) == COUNT + 18
    assert own.search_vectors(unit(COUNT)[5], 1)[0].paths != ["a/5.jpg"]
    assert own.search_vectors(unit(20, 3)[3:6], 1)[0].paths == ["new/3.jpg"]
    assert own.search_vectors(unit(20, 3)[4], 1)[0].paths != ["new/4.jpg"]
    with pytest.raises(UserError, match="nothing was removed: a/5.jpg"):
        own.remove(["a/6.jpg", "a/5.jpg"])
    reopened = Gallery.open(own.folder)
    assert len(reopened) == COUNT + 18
    assert reopened.remove(paths(COUNT)[6:]) == COUNT - 6 and len(reopened) == 24
    assert Gallery.open(own.folder).search_vectors(unit(20, 3)[7], 1)[0].paths == ["new/7.jpg"]
    assert len(own) == COUNT + 18  # as it was opened


def test_a_reader_keeps_what_it_opened(tmp_path):
    reader = made_up(tmp_path / "shop")
    writer = Gallery.open(reader.folder)
    writer.remove(paths(COUNT)[1:])
    made_up(reader.folder, 10)
    assert reader.search_vectors(unit(COUNT)[200], 1)[0].paths == ["a/200.jpg"] and len(reader) == COUNT
    with pytest.raises(UserError, match="rebuilt"):
        reader.remove("a/200.jpg")


def test_few_segments_and_no_needless_writing(tmp_path):
    gallery = made_up(tmp_path / "shop")
    for i in range(20):
        gallery.add_vectors(unit(3, i), paths(3, f"n{i}"))
    segments = gallery.manifest["store"]["segments"]
    assert segments[0]["vectors"] == "vectors-1.npy" and len(segments) <= 5
    assert [path for rows, _ in gallery._store.batches() for path in rows.paths][-3:] == paths(3, "n19")


def test_a_gallery_may_become_empty(own):
    assert own.remove(paths(COUNT)) == COUNT
    assert len(own) == len(Gallery.open(own.folder)) == 0
    assert own.search_vectors(unit(2))[1].paths == []
    assert own.add_vectors(unit(1), ["x"]) == 1 and own.search_vectors(unit(1))[0].paths == ["x"]
    with pytest.raises(UserError, match="no vectors"):
        Gallery.from_vectors(unit(0), [], own.folder)


def test_a_reader_beside_a_writer(tmp_path):
    folder = made_up(tmp_path / "shop").folder
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            made_up(folder)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            assert Gallery.open(folder).search_vectors(unit(COUNT)[3], 1)[0].paths == ["a/3.jpg"]
    finally:
        stop.set()
        writer.join()


def test_threads_find_the_same(gallery):
    queries = unit(40, 8)
    alone = [found.paths for found in gallery.search_vectors(queries)]
    results: dict[int, list] = {}

    def search(number: int) -> None:
        results[number] = [gallery.search_vectors(query)[0].paths for query in queries]

    threads = [threading.Thread(target=search, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[number] == alone for number in range(6))


def test_one_writer(own):
    with bundle.writing(own.folder):
        for change in (
            lambda: own.add_vectors(unit(1), ["x"]),
            lambda: own.remove("a/1.jpg"),
            lambda: made_up(own.folder),
        ):
            with pytest.raises(UserError, match=f"{own.folder}: another process is changing"):
                change()
        assert len(Gallery.open(own.folder)) == COUNT
    assert own.remove("a/1.jpg") == 1


@pytest.mark.slow
@pytest.mark.parametrize("store, stride", [("files", 17), pytest.param("files", 1, marks=pytest.mark.sweep)])
def test_killed_at_any_step(tmp_path, store, stride):
    result = run_python(
        "import runpy; runpy.run_module('tests.gallery.killed', run_name='__main__')", tmp_path, store, stride
    )
    assert result.returncode == 0, result.stderr


def test_the_lock_of_a_failed_build_is_no_lock(tmp_path):
    (tmp_path / "lock").touch()
    opened = bundle.try_lock

    def delete_meanwhile(file):
        (tmp_path / "lock").unlink()
        return opened(file)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="another process"):
        patch.setattr(bundle, "try_lock", delete_meanwhile)
        with bundle.writing(tmp_path):
            pass


def test_lancedb_that_cannot_be_read(tmp_path):
    reader = made_up(tmp_path / "shop", store="lancedb")
    reader.add_vectors(unit(1, 4), ["a\udcff.jpg"], root="/images")
    assert reader.add_vectors(unit(1, 5), ["a\udcff.jpg"], root="/images") == 1 and len(reader) == COUNT + 1
    assert reader.remove("a\udcff.jpg") == 1
    made_up(reader.folder, 10, store="lancedb")
    with pytest.raises(UserError, match="lance: lancedb cannot read the table: .*open the gallery again"):
        reader.search_vectors(unit(1))


def test_a_copy_opens_elsewhere(own, tmp_path):
    shutil.move(own.folder, tmp_path / "elsewhere")
    copy = Gallery.open(tmp_path / "elsewhere")
    assert copy.search_vectors(unit(COUNT)[9], 1)[0].paths == ["a/9.jpg"]


def test_damage_is_found(tmp_path):
    folder = made_up(tmp_path / "shop").folder
    for name in ("vectors-1.npy", "list-1.safetensors"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name}: changed since it was written"):
            Gallery.open(folder)
        (folder / name).write_bytes(good[:-5])
        with pytest.raises(UserError, match=f"{name}: .* bytes in place of"):
            Gallery.open(folder, verify=False)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{folder}: lacks {name}"):
            Gallery.open(folder)
        (folder / name).write_bytes(good)
    manifest = (folder / "gallery.json").read_text()
    for text in (
        manifest[:-9],
        manifest.replace('"dim": 16', '"dim": 8'),
        "{}",
        "[]",
        "null",
        json.dumps({"format": "x"}),
    ):
        (folder / "gallery.json").write_text(text)
        with pytest.raises(UserError, match="gallery.json: damaged, or not a gallery's manifest"):
            Gallery.open(folder)


def test_half_written_and_foreign_folders_are_refused_by_name(tmp_path):
    cases = {
        "absent": "no such gallery",
        "empty": "no gallery.json",
        "half": "never finished",
        "foreign": "no gallery.json",
    }
    for name in ("empty", "half", "foreign"):
        (tmp_path / name).mkdir()
    for name in ("lock", "vectors-1.npy"):
        (tmp_path / "half" / name).touch()
    (tmp_path / "foreign" / "thesis.txt").touch()
    for name, reason in cases.items():
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*{reason}"):
            Gallery.open(tmp_path / name)
    with pytest.raises(UserError, match="foreign: holds other files"):
        made_up(tmp_path / "foreign")
    (tmp_path / "theirs" / "lance" / "table").mkdir(parents=True)  # as an unfinished build, but for its lock
    with pytest.raises(UserError, match="theirs: holds other files"):
        made_up(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "lance" / "table").is_dir()
    assert sorted(file.name for file in (tmp_path / "foreign").iterdir()) == ["thesis.txt"]
    for name in ("absent", "empty", "half"):
        assert len(made_up(tmp_path / name)) == COUNT


def test_odd_names_and_values(tmp_path):
    names = ["ü/ß 1.jpg", "a\udcff.jpg", "line\nend.jpg", ""]
    columns = {"x": [None, 1.5, np.float32(2), float("nan")], "y": [True, "1", 2**70, "\udcff"]}
    made_up_four = Gallery.from_vectors(unit(4), names, tmp_path / "odd", metadata=columns)
    found = {}
    for result in made_up_four.search_vectors(unit(4), 1):
        found[result.paths[0]] = result.metadata[0]
    assert found == dict(zip(names, [{"x": x, "y": y} for x, y in zip([None, 1.5, 2.0, None], columns["y"])]))
    with pytest.raises(UserError, match="column 'x': 3 values for 4"):
        Gallery.from_vectors(unit(4), names, tmp_path / "other", metadata={"x": [1, 2, 3]})
    with pytest.raises(UserError, match="5 vectors for 4 paths"):
        Gallery.from_vectors(unit(5), names, tmp_path / "other")


def test_parquet_holds_what_the_documented_lines_read(gallery, tmp_path):
    pa = pytest.importorskip("pyarrow")
    assert gallery.export_parquet(tmp_path / "vectors.parquet") == COUNT
    table = pa.parquet.read_table(tmp_path / "vectors.parquet")
    types = {field.name: field.type for field in table.schema}
    assert types["vector"] == pa.list_(pa.field("item", pa.float32(), nullable=False), DIM)
    del types["vector"]
    assert types == {"path": pa.string(), "brand": pa.string(), "price": pa.int64(), "note": pa.string()}
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), unit(COUNT))
    assert table["path"].to_pylist() == paths(COUNT) and table["price"].to_pylist() == metadata(COUNT)["price"]


def test_fastirt_gallery():
    assert fastirt.Gallery is Gallery
