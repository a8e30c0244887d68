"""Exact search: ties, copies and rounding, in parts, and with either backend."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastirt.retrieval import search as search_module
from fastirt.retrieval.search import Distinct, search
from tests.helpers import CPU, run_python
from tests.retrieval.vectors import neighbors, vectors


def with_copies(count, dim=384, seed=0):
    """Unit vectors of which about a third are copies of others, and the set of copies each belongs
    to."""
    gallery, rng = vectors(count, dim, seed), np.random.default_rng(seed)
    gallery[rng.integers(0, count, count // 3)] = gallery[rng.integers(0, count, count // 3)]
    return gallery, torch.from_numpy(np.unique(gallery.numpy(), axis=0, return_inverse=True)[1].ravel())


def by_definition(query, gallery, k, exclude_self):
    """Float64, whole, sorted by (falling similarity, rising row)."""
    values = query.double() @ gallery.double().T
    values = (values * 2**40).round()  # copies are equal whatever the order of summation
    if exclude_self:
        values.fill_diagonal_(float("-inf"))
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_copies_stay_in_catalogue_order_however_the_backend_rounds(backend, exclude_self):
    """FAISS's matrix product gives copies different similarities at this size, unless they are
    searched as one."""
    gallery, copy_of = with_copies(1000)
    similarities, indices = neighbors(gallery, gallery, 50, exclude_self=exclude_self, backend=backend)
    copies = copy_of[indices[:, 1:]] == copy_of[indices[:, :-1]]
    assert copies.sum() > 1000
    assert (indices[:, 1:] > indices[:, :-1])[copies].all()
    assert torch.equal(similarities[:, 1:][copies], similarities[:, :-1][copies])
    assert (similarities[:, 1:] <= similarities[:, :-1]).all()
    # a different neighbour than in float64 only where two similarities are equal in float32
    expected = by_definition(gallery, gallery, 50, exclude_self)
    rows, places = (indices != expected).nonzero(as_tuple=True)
    exact = gallery.double() @ gallery.double().T
    assert len(rows) < 100
    found, best = exact[rows, indices[rows, places]], exact[rows, expected[rows, places]]
    torch.testing.assert_close(found, best, atol=3e-7, rtol=0)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("k", [1, 3, 20, 149])
def test_ties_of_unequal_vectors_are_settled_at_every_place(backend, exclude_self, k, monkeypatch):
    """Small whole numbers: products are exact, and many different vectors tie, also at the k-th
    place."""
    monkeypatch.setattr(search_module, "CHUNK_VALUES", 1000)
    gallery = torch.randint(-1, 2, (150, 4), generator=torch.Generator().manual_seed(k)).float()
    similarities, indices = neighbors(gallery, gallery, k, exclude_self=exclude_self, backend=backend)
    assert torch.equal(indices, by_definition(gallery, gallery, k, exclude_self))
    assert torch.equal(similarities, (gallery @ gallery.T).gather(1, indices))


def test_a_query_that_is_not_its_own_nearest_is_still_left_out():
    """Vectors of unequal length: row 2 finds itself last."""
    gallery = torch.tensor([[4.0, 0], [3, 0], [1, 0], [2, 0]])
    _, indices = neighbors(gallery, gallery, 3, exclude_self=True)
    assert indices.tolist() == [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2]]
    _, indices = neighbors(gallery, gallery, 1, exclude_self=True)
    assert indices.flatten().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_a_collapsed_model_is_measured_without_a_loop_over_queries(backend, monkeypatch):
    """Everything ties: each query's neighbours are the first rows but its own, found a chunk at a
    time."""
    calls, top = [], search_module._top
    monkeypatch.setattr(search_module, "_top", lambda *a: calls.append(1) or top(*a))
    gallery = F.normalize(torch.ones(2000, 16), dim=1)
    _, indices = neighbors(gallery, gallery, 5, exclude_self=True, backend=backend)
    assert indices[[0, 3, 1999]].tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4]]
    assert 0 < len(calls) < 10


def test_distinct_rows_expand_to_all_their_copies():
    gallery = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    distinct = Distinct(gallery)
    assert distinct.vectors.shape == (2, 2)
    first = int(distinct.group[0])
    similarities, rows = distinct.expand(torch.tensor([[0.9, 0.1]]), torch.tensor([[first, 1 - first]]), 4)
    assert rows.tolist() == [[0, 2, 3, 1]]
    torch.testing.assert_close(similarities, torch.tensor([[0.9, 0.9, 0.9, 0.1]]))
    assert not Distinct(vectors(10)).has_copies


def test_above_faiss_limit_on_a_gpu_torch_takes_over_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(search_module, "_Torch", lambda gallery, device: ("torch", device.type))
    with caplog.at_level("INFO", logger="fastirt"):
        assert search_module._backend(vectors(4), 2049, "auto", torch.device("cuda")) == ("torch", "cuda")
    assert "2048" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_an_index_in_parts_finds_what_one_finds(parts):
    """As over the GPUs of a node: each part has its stretch of the gallery, and rows are numbered
    through."""
    gallery = vectors(1001, 384)
    one, several = search_module._Faiss(gallery, CPU), search_module._Faiss(gallery, CPU, parts)
    assert several.index.count() == parts
    assert several.index.ntotal == 1001
    (expected, rows), (found, others) = one(gallery[:100], 20), several(gallery[:100], 20)
    torch.testing.assert_close(found, expected, atol=3e-7, rtol=0)
    assert (rows == others).float().mean() > 0.99  # two that are equal in float32 may change places


def test_products_are_float32_where_training_allows_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with search_module._full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_faiss_and_torch_share_a_process():
    """Each brings an OpenMP of its own: also with FAISS imported first (elsewhere torch is), both
    compute, with torch's number of threads."""
    code = """import faiss, torch
torch.set_num_threads(2)
from fastirt.retrieval.search import search
z = torch.nn.functional.normalize(torch.randn(600, 32, requires_grad=True), dim=1)
for _ in range(3):
    (z @ z.T).sum().backward(retain_graph=True)
    found = list(search(z.detach(), z.detach(), 5, backend="faiss"))
assert (found[0][2][:, 0] == torch.arange(600)).all() and faiss.omp_get_max_threads() == 2
"""
    done = run_python(code, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_ties_go_by_gallery_row_also_at_the_last_place(backend):
    axis = torch.eye(4)
    gallery = torch.cat([axis[0].expand(20, 4), axis[1].expand(5, 4)])
    _, indices = neighbors(axis[:1], gallery, 3, backend=backend)
    assert indices.tolist() == [[0, 1, 2]]
    _, indices = neighbors(gallery, gallery, 4, exclude_self=True, backend=backend)
    for row, expected in {0: [1, 2, 3, 4], 2: [0, 1, 3, 4], 19: [0, 1, 2, 3], 21: [20, 22, 23, 24]}.items():
        assert indices[row].tolist() == expected


def test_backends_and_chunks_agree(monkeypatch):
    gallery = vectors(300, 24)
    whole = neighbors(gallery, gallery, 7, exclude_self=True, backend="faiss")
    monkeypatch.setattr(search_module, "CHUNK_VALUES", 1500)
    for backend in ("faiss", "torch"):
        similarities, indices = neighbors(gallery, gallery, 7, exclude_self=True, backend=backend)
        assert torch.equal(indices, whole[1])
        torch.testing.assert_close(similarities, whole[0])


def test_what_is_held_at_once_is_bounded():
    query = vectors(5000, 4)
    sizes = [indices.numel() for _, _, indices in search(query, query[:3000], 2500, backend="torch")]
    assert len(sizes) > 1 and max(sizes) <= search_module.CHUNK_VALUES


def test_a_missing_faiss_is_said_and_replaced(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with caplog.at_level("INFO", logger="fastirt"):
        neighbors(vectors(5), vectors(9), 2)
    assert "plain torch" in caplog.text


@pytest.mark.parametrize("after", [0, 2])
def test_a_faiss_that_fails_during_the_search_is_replaced(after, monkeypatch, caplog):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search_module, "CHUNK_VALUES", 100)
    gallery, calls = vectors(50), []
    expected = neighbors(gallery, gallery, 7, exclude_self=True, backend="torch")
    whole = search_module._Faiss.__call__

    def failing(self, part, k):
        calls.append(len(part))
        if len(calls) > after:
            raise RuntimeError("Error in GpuIndex: out of temporary memory\nat line 7")
        return whole(self, part, k)

    monkeypatch.setattr(search_module._Faiss, "__call__", failing)
    found = neighbors(gallery, gallery, 7, exclude_self=True, backend="faiss")
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    assert len(calls) == after + 1
    assert caplog.text.count("out of temporary memory") == 1 and "at line 7" not in caplog.text
