"""FAISS factory indexes of a gallery."""

import faiss.contrib.torch_utils  # noqa: F401  as a search on a GPU does: FAISS takes other arrays then
import numpy as np
import pytest

from fastirt.errors import UserError
from fastirt.gallery import Gallery
from tests.gallery.made_up import COUNT, made_up, paths, unit


@pytest.mark.parametrize("kind", ["HNSW8", "IVF4,PQ4x4", "PCA8,IVF4,SQ8", "PQ4x4,RFlat"])
def test_an_index_through_all_changes(tmp_path, kind, capfd):
    gallery = made_up(tmp_path / "shop", kind=kind)
    quality = gallery.index
    assert quality["kind"] == kind and 0.5 < quality["recall"] <= 1 and quality["k"] == 10 and quality["queries"] == 256
    assert 4 < quality["bytes_per_vector"] < 600
    exact = [found.paths for found in gallery.search_vectors(unit(30, 3), 5, exact=True)]
    found = [found.paths for found in gallery.search_vectors(unit(30, 3), 5)]
    assert np.mean([len({*a} & {*b}) / 5 for a, b in zip(exact, found)]) > 0.5
    gallery.add_vectors(unit(20, 4), paths(20, "new"))
    gallery.remove(["new/3.jpg", "a/7.jpg"])
    gallery = Gallery.open(gallery.folder)
    assert gallery.search_vectors(unit(20, 4)[5], 1)[0].paths == ["new/5.jpg"]
    assert not {"new/3.jpg", "a/7.jpg"} & {*gallery.search_vectors(unit(1), 318)[0].paths}
    for where in ("brand=b3", "brand!=b3"):
        result = gallery.search_vectors(unit(1, 5), 30, where)[0]
        assert len(result.paths) == 30 and all((row["brand"] == "b3") == ("!" not in where) for row in result.metadata)
        assert list(result.similarities) == sorted(result.similarities, reverse=True)
    gallery.remove(paths(COUNT)[8:250])  # over half: built again
    assert gallery.index["file"] == "index-4.faiss" and Gallery.open(gallery.folder).search_vectors(unit(1), 1)
    assert "WARNING" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("HNSW0", "the number 0"),
        ("PQ4x0", "the number 0"),
        ("HNSW1", "HNSW1 has one link"),
        ("IVF4,NSG1", "NSG1 has one link"),
        ("IVF99999999999,Flat", "the number 99999999999"),
        ("PQ5", "no FAISS index of 16 dimensions .*multiple"),
        ("nonsense", "could not parse index string nonsense"),
        ("IVF4,", "no FAISS index of 16 dimensions"),
        ("IDMap,Flat", "cannot be trained on 300 vectors .*add_with_ids"),
        ("IVF4096,PQ4", "4,096 lists need at least as many vectors, and better 159,744; there are 300"),
        ("PQ4x12", "cannot be trained on 300 vectors .*at least as large as number of clusters"),
    ],
)
def test_refused_kinds_leave_nothing(tmp_path, kind, reason):
    with pytest.raises(UserError, match=f"--kind '{kind}': .*{reason}") as error:
        made_up(tmp_path / "shop", kind=kind)
    assert "\n" not in str(error.value) and ".cpp" not in str(error.value) and not (tmp_path / "shop").exists()


def test_params(tmp_path):
    assert made_up(tmp_path / "a", kind="IVF16,Flat", params="nprobe=16").index["recall"] == 1
    assert made_up(tmp_path / "b", kind="IVF16,Flat", params="nprobe=1").index["recall"] < 0.9
    with pytest.raises(UserError, match="--params 'nprob=3': "):
        made_up(tmp_path / "c", kind="IVF16,Flat", params="nprob=3")
    with pytest.raises(UserError, match="--kind Flat: .* --store files"):
        made_up(tmp_path / "d", kind="Flat", store="lancedb")


def test_an_index_that_cannot_follow_a_change(tmp_path):
    graph = made_up(tmp_path / "graph", kind="NSG8")
    with pytest.raises(UserError, match="its index takes no further vectors .*NSG does not support"):
        graph.add_vectors(unit(1, 4), ["x"])
    assert len(Gallery.open(graph.folder)) == COUNT
    codes = made_up(tmp_path / "codes", kind="PQ4x8")
    assert codes.remove(paths(COUNT)[20:]) == COUNT - 20  # 20 vectors cannot train it
    reopened = Gallery.open(codes.folder)
    assert len(reopened) == 20 and len(reopened.search_vectors(unit(1), 30)[0].paths) == 20
