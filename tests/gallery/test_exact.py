"""Exact search over blocks, segments and filters."""

import numpy as np
import pytest
import torch

from fastirt.gallery import exact as module
from fastirt.gallery.exact import Exact
from tests.gallery.made_up import unit

LENGTHS = (100, 1, 57)


def by_definition(vectors, queries, k, keep):
    similarities = queries @ vectors.T
    similarities[:, ~keep] = -np.inf
    rows = np.argsort(-similarities, axis=1, kind="stable")[:, : min(k, keep.sum())]
    return np.take_along_axis(similarities, rows, 1), rows


@pytest.fixture(params=["cpu", "as on a GPU"])
def searched(request, monkeypatch):
    for name in ("BLOCK_FEW", "BLOCK_LEAST", "BLOCK", "QUERIES"):
        monkeypatch.setattr(module, name, 16)
    vectors = unit(sum(LENGTHS))
    search = Exact(np.split(vectors, np.cumsum(LENGTHS)[:-1]))
    if request.param != "cpu":
        search.on_gpu = torch.from_numpy(vectors)
    return vectors, search


@pytest.mark.parametrize("count", [1, 3, 4, 40])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.05, 0.0])
def test_as_the_definition(searched, count, kept):
    vectors, search = searched
    keep = np.random.default_rng(1).random(len(vectors)) < kept
    for k in (1, 7, 500):
        for mask in (keep, None):
            similarities, rows = search.search(unit(count, 3), k, mask)
            all_rows = np.ones(len(vectors), bool) if mask is None else mask
            expected, expected_rows = by_definition(vectors, unit(count, 3), k, all_rows)
            assert np.array_equal(rows, expected_rows) and np.allclose(similarities, expected, atol=1e-6)


def test_equal_rows_in_order(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_FEW", 16)
    monkeypatch.setattr(module, "BLOCK_LEAST", 16)
    vectors = np.tile(unit(10), (8, 1))
    assert Exact([vectors[:30], vectors[30:]]).search(vectors[3:4], 8)[1].tolist() == [list(range(3, 80, 10))]
