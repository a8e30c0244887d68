"""Search for neighbors: excluded rows, ties, in parts, and with either backend."""

import sys

import pytest
import torch

from fastirt.retrieval import search as search_module
from fastirt.retrieval.search import search
from tests.helpers import CPU, run_python
from tests.retrieval.vectors import neighbors, vectors


def test_a_query_that_is_not_its_own_nearest_is_still_left_out():
    """Vectors of unequal length: row 2 finds itself last."""
    gallery = torch.tensor([[4.0, 0], [3, 0], [1, 0], [2, 0]])
    _, indices = neighbors(gallery, gallery, 3, exclude_self=True)
    assert indices.tolist() == [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2]]
    _, indices = neighbors(gallery, gallery, 1, exclude_self=True)
    assert indices.flatten().tolist() == [1, 0, 0, 0]


def test_above_faiss_limit_on_a_gpu_torch_takes_over_and_says_so(caplog):
    with caplog.at_level("INFO", logger="fastirt"):
        assert search_module.make_index(vectors(4), 2049, "auto", torch.device("cuda"), 1, "plain torch") is None
    assert "2048" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_an_index_in_parts_finds_what_one_finds(parts):
    """As over the GPUs of a node: each part has its stretch of the gallery, and rows are numbered
    through."""
    gallery = vectors(1001, 384)
    one, several = search_module.Faiss(gallery, CPU), search_module.Faiss(gallery, CPU, parts)
    assert several.index.count() == parts
    assert several.index.ntotal == 1001
    (expected, rows), (found, others) = one(gallery[:100], 20), several(gallery[:100], 20)
    torch.testing.assert_close(found, expected, atol=3e-7, rtol=0)
    assert (rows == others).float().mean() > 0.99  # two that are equal in float32 may change places


def test_products_are_float32_where_training_allows_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with search_module.full_precision():
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
def test_equal_neighbors_come_in_the_gallery_order(backend):
    """Small whole numbers: products are exact, and many different vectors tie."""
    gallery = torch.randint(-1, 2, (150, 4), generator=torch.Generator().manual_seed(0)).float()
    similarities, indices = neighbors(gallery, gallery, 149, exclude_self=True, backend=backend)
    expected = (gallery @ gallery.T).fill_diagonal_(float("-inf")).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, expected.indices[:, :149])
    assert torch.equal(similarities, expected.values[:, :149])


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
    whole = search_module.Faiss.__call__

    def failing(self, part, k):
        calls.append(len(part))
        if len(calls) > after:
            raise RuntimeError("Error in GpuIndex: out of temporary memory\nat line 7")
        return whole(self, part, k)

    monkeypatch.setattr(search_module.Faiss, "__call__", failing)
    found = neighbors(gallery, gallery, 7, exclude_self=True, backend="faiss")
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    assert len(calls) == after + 1
    assert caplog.text.count("out of temporary memory") == 1 and "at line 7" not in caplog.text
