"""Metrics where classes are large, queries many and memory short; the definitions are tested in test_retrieval.py."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastirt.retrieval import search as search_module
from fastirt.retrieval.metrics import retrieval_metrics


def clusters(count, classes, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return F.normalize(centres[labels] + 1.5 * torch.randn(count, dim, generator=generator), dim=1), labels


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_chunks_and_backends_give_the_same_metrics(monkeypatch, backend, same):
    """Also with classes far larger than the largest K, and images that occur twice in different classes."""
    gallery, labels = clusters(700, 4)
    gallery[100:200] = gallery[300:400]
    query, query_labels = (gallery, labels) if same else clusters(90, 4, seed=1)
    whole = retrieval_metrics(query, query_labels, gallery, labels, (1, 5), exclude_self=same, backend="torch")
    monkeypatch.setattr(search_module, "CHUNK_VALUES", 20_000)
    parts = retrieval_metrics(query, query_labels, gallery, labels, (1, 5), exclude_self=same, backend=backend)
    assert parts == pytest.approx(whole, abs=2e-4)  # float32 rounds with the shape: near-equal neighbours may swap
    assert 0.3 < whole["r_precision"] < whole["recall@1"] < whole["recall@5"] <= 1  # chance: 0.25
    assert whole["map@r"] < whole["r_precision"]


def test_a_perfect_and_a_useless_embedding():
    labels = torch.arange(40) // 4
    perfect = F.one_hot(labels).float()
    best = retrieval_metrics(perfect, labels, perfect, labels, (1, 3), exclude_self=True)
    assert [best[name] for name in ("recall@1", "recall@3", "map@r", "r_precision")] == [1.0] * 4
    shifted = F.one_hot((labels + 1) % 10).float()  # each query sees the class beside its own
    worst = retrieval_metrics(shifted, labels, perfect, labels, (1, 4), exclude_self=False)
    assert [worst[name] for name in ("recall@1", "recall@4", "map@r", "r_precision")] == [0.0] * 4


@pytest.mark.slow
def test_memory_does_not_grow_with_queries_times_neighbours():
    """6,000 queries x 1,000 neighbours are 72 MB of similarities and indices alone, and much more while reduced."""
    code = """
import resource, torch
torch.set_num_threads(1)
from fastirt.retrieval import search
from fastirt.retrieval.metrics import retrieval_metrics
search.CHUNK_VALUES = 2**19
g = torch.Generator().manual_seed(0)
def run(n):
    z = torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1)
    retrieval_metrics(z, torch.arange(n) % 500, z[:1500], torch.arange(1500) % 500, (1000,), exclude_self=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small, large = run(1_500), run(6_000)
assert large - small < 60, (small, large)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
