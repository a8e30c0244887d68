"""Metrics: against the definition and pytorch-metric-learning, at their edges and at scale."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from fastirt.errors import UserError
from fastirt.retrieval.metrics import measure, retrieval_metrics
from tests.helpers import run_python
from tests.retrieval.test_summary import ALL_RANKS
from tests.retrieval.vectors import vectors


def clusters(count, classes, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return F.normalize(centers[labels] + 1.5 * torch.randn(count, dim, generator=generator), dim=1), labels


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("backend", ["auto", "ranks", "faiss", "torch"])
def test_backends_give_the_same_metrics(backend, same):
    """Also with classes far larger than the largest K, and images that occur twice in different
    classes; backends that find the nearest alone leave out what needs all ranks."""
    gallery, labels = clusters(300, 3)
    gallery[100:150] = gallery[200:250]
    query, query_labels = (gallery, labels) if same else clusters(60, 3, seed=1)
    whole = retrieval_metrics(query, query_labels, gallery, labels, (1, 5), exclude_self=same, backend="ranks")
    other = retrieval_metrics(query, query_labels, gallery, labels, (1, 5), exclude_self=same, backend=backend)
    assert set(whole) - set(other) == (ALL_RANKS if backend in ("faiss", "torch") else set())
    # a matrix product may swap neighbors whose similarities are nearly equal
    assert other == pytest.approx({name: whole[name] for name in other}, abs=2e-3)
    assert 0.3 < whole["r_precision"] < whole["recall@1"] < whole["recall@5"] <= 1  # chance: 0.33
    assert whole["map@r"] < whole["r_precision"]


def test_means_over_classes():
    """One class has many queries, and is found better than the others."""
    gallery, labels = clusters(200, 6)
    labels[:100] = 0
    gallery[:100] = F.normalize(gallery[0] + 0.05 * gallery[:100], dim=1)
    call = dict(exclude_self=True)
    by_query = retrieval_metrics(gallery, labels, gallery, labels, (1,), **call)
    by_class = retrieval_metrics(gallery, labels, gallery, labels, (1,), average="class", **call)
    assert by_class["recall@1"] < by_query["recall@1"] and by_class["queries"] == by_query["queries"] == 200
    expected = []
    for label in range(6):
        own = (labels == label).nonzero().flatten()
        one = retrieval_metrics(gallery[own], labels[own], gallery, labels, (1,), exclude=own)
        expected.append([one[name] for name in ("recall@1", "map@r", "minp")])
    found = [by_class[name] for name in ("recall@1", "map@r", "minp")]
    assert found == pytest.approx(torch.tensor(expected, dtype=torch.float64).mean(dim=0).tolist())


def test_a_perfect_and_a_useless_embedding():
    labels = torch.arange(40) // 4
    perfect = F.one_hot(labels).float()
    best = retrieval_metrics(perfect, labels, perfect, labels, (1, 3), exclude_self=True)
    assert [best[name] for name in ("recall@1", "recall@3", "map@r", "r_precision")] == [1.0] * 4
    shifted = F.one_hot((labels + 1) % 10).float()  # each query sees the class beside its own
    worst = retrieval_metrics(shifted, labels, perfect, labels, (1, 4), exclude_self=False)
    assert [worst[name] for name in ("recall@1", "recall@4", "map@r", "r_precision")] == [0.0] * 4


@pytest.mark.slow
def test_memory_does_not_grow_with_queries_times_neighbors():
    """6,000 queries x 1,500 gallery images are 36 MB of similarities alone, and much more while
    reduced."""
    code = """
import resource, torch
torch.set_num_threads(1)
from fastirt.retrieval.metrics import measure, retrieval_metrics
g = torch.Generator().manual_seed(0)
def run(n):
    z = torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1)
    retrieval_metrics(z, torch.arange(n) % 500, z[:1500], torch.arange(1500) % 500, (1000,), exclude_self=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small, large = run(1_500), run(6_000)
assert large - small < 60, (small, large)
"""
    done = run_python(code, timeout=60)
    assert done.returncode == 0, done.stderr


def by_definition(query, query_labels, gallery, gallery_labels, ranks, same, own=None):
    """Query by query in float64; ties by gallery row."""
    own = list(range(len(query))) if same else [-1] * len(query) if own is None else own.tolist()
    recalls, precision, average, count = {k: 0 for k in ranks}, 0.0, 0.0, 0
    whole, reciprocal, penalty, first = 0.0, 0.0, 0.0, []
    for i in range(len(query)):
        scores = gallery.double() @ query[i].double()
        order = sorted((j for j in range(len(gallery)) if j != own[i]), key=lambda j: (-round(float(scores[j]), 6), j))
        right = [bool(gallery_labels[j] == query_labels[i]) for j in order]
        r = sum(right)
        if r == 0:
            continue
        count += 1
        for k in ranks:
            recalls[k] += any(right[:k])
        precision += sum(right[:r]) / r
        average += sum(sum(right[: p + 1]) / (p + 1) for p in range(r) if right[p]) / r
        places = [place for place, is_right in enumerate(right, 1) if is_right]
        whole += sum(j / place for j, place in enumerate(places, 1)) / r
        reciprocal += 1 / places[0]
        penalty += r / places[-1]
        first.append(places[0])
    return {
        **{f"recall@{k}": recalls[k] / count for k in ranks},
        "r_precision": precision / count,
        "map@r": average / count,
        "map": whole / count,
        "mrr": reciprocal / count,
        "minp": penalty / count,
        "median_rank": float(np.median(first)),
        "queries": count,
    }


@pytest.mark.parametrize("backend", ["ranks", "faiss", "torch"])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_the_definition_with_duplicates_and_lonely_queries(backend, same, seed):
    rng = np.random.default_rng(seed)
    gallery, labels = vectors(60, seed=seed), torch.from_numpy(rng.integers(0, 9, 60))
    gallery[30:40] = gallery[5]  # exact duplicates, of several classes
    gallery[50] = gallery[51] = gallery[0]
    labels[59] = 40  # alone in its class
    query, query_labels = (
        (gallery, labels) if same else (vectors(25, seed=seed + 9), torch.from_numpy(rng.integers(0, 12, 25)))
    )
    if not same:
        query[:3] = gallery[[5, 0, 7]]
    ranks = (1, 2, 4, 10)
    ours = retrieval_metrics(query, query_labels, gallery, labels, ranks, exclude_self=same, backend=backend)
    expected = by_definition(query, query_labels, gallery, labels, ranks, same)
    for name, value in expected.items():
        if name in ALL_RANKS and backend != "ranks":
            continue
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert ours["unmatched"] == len(query) - ours["queries"] > 0 and ours["gallery"] == 60


@pytest.mark.parametrize("same", [True, False])
def test_metrics_equal_pytorch_metric_learning(same):
    """Images that occur twice in a class tie, which changes nothing; there other ties have no
    order, and MRR is float32."""
    labels = torch.arange(120) % 15
    gallery = F.normalize(vectors(120, 16) + 0.4 * vectors(15, 16, seed=3)[labels], dim=1)
    gallery[105:] = gallery[90:105]
    query, query_labels = (
        (gallery, labels)
        if same
        else (F.normalize(vectors(40, 16, seed=5) + vectors(15, 16, seed=3)[labels[:40]], dim=1), labels[:40])
    )
    names = {
        "recall@1": "precision_at_1",
        "r_precision": "r_precision",
        "map@r": "mean_average_precision_at_r",
        "map": "mean_average_precision",
        "mrr": "mean_reciprocal_rank",
    }
    calculator = AccuracyCalculator(include=tuple(names.values()), k=len(gallery) - same, device=torch.device("cpu"))
    theirs = calculator.get_accuracy(query, query_labels, gallery, labels, ref_includes_query=same)
    ours = retrieval_metrics(query, query_labels, gallery, labels, (1,), exclude_self=same)
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: theirs[other] for name, other in names.items()}, abs=1e-7
    )


def test_k_larger_than_the_gallery_and_no_match_at_all():
    z, labels = vectors(5), torch.arange(5)
    with pytest.raises(UserError, match="only 4 images beside the query"):
        retrieval_metrics(z, labels, z, labels, (5,), exclude_self=True)
    with pytest.raises(UserError, match="no query"):
        retrieval_metrics(z, labels, z, labels, (1,), exclude_self=True)


@pytest.mark.parametrize("backend", ["ranks", "faiss", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_a_query_that_is_in_the_gallery_does_not_find_itself(backend, seed):
    """Some queries are gallery rows under another place, some are not; duplicates of theirs
    stay."""
    rng = np.random.default_rng(seed)
    gallery, labels = vectors(50, seed=seed), torch.from_numpy(rng.integers(0, 9, 50))
    gallery[30:36] = gallery[5]
    own = torch.from_numpy(rng.permutation(50)[:20].copy())
    query, query_labels = gallery[own].clone(), labels[own].clone()
    own[::3] = -1
    query[::3] = vectors(7, seed=seed + 10)
    query_labels[3] = (labels[own[3]] + 1) % 9
    found = retrieval_metrics(query, query_labels, gallery, labels, (1, 2, 49), exclude=own, backend=backend)
    expected = by_definition(query, query_labels, gallery, labels, (1, 2, 49), False, own)
    known = set(expected) - (set() if backend == "ranks" else ALL_RANKS)
    assert {name: found[name] for name in known} == pytest.approx({name: expected[name] for name in known})
    with pytest.raises(UserError, match="--rank 50.* at most 49"):
        retrieval_metrics(query, query_labels, gallery, labels, (50,), exclude=own)
    nobody = torch.full_like(own, -1)
    assert retrieval_metrics(query, query_labels, gallery, labels, (50,), exclude=nobody)["recall@50"] <= 1


def test_each_k_counts_once_and_in_order():
    query, labels = vectors(6), torch.tensor([0, 0, 1, 1, 2, 2])
    metrics = retrieval_metrics(query, labels, query, labels, (2, 1, 1, 2, 2), exclude_self=True)
    assert [name for name in metrics if name.startswith("recall@")] == ["recall@1", "recall@2"]
    assert list(metrics)[0] == "recall@1"
    assert metrics["recall@1"] <= metrics["recall@2"] <= 1
    assert metrics == retrieval_metrics(query, labels, query, labels, (1, 2), exclude_self=True)
    for old in (dict(same=True), dict(own=torch.arange(len(query)))):  # accepted for one release
        assert metrics == retrieval_metrics(query, labels, query, labels, (1, 2), **old)
    without = retrieval_metrics(query, labels, query, labels, (), exclude_self=True)
    assert without["map@r"] == metrics["map@r"] and "recall@1" not in without


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(query=vectors(0), query_labels=torch.zeros(0, dtype=torch.int64)), "query set is empty"),
        (dict(gallery=vectors(0), gallery_labels=torch.zeros(0, dtype=torch.int64)), "gallery set is empty"),
        (dict(query_labels=torch.tensor([0, -1, 0, 1])), "label -1"),
        (dict(gallery_labels=torch.tensor([0, 1, -7, 1])), "label -7"),
        (dict(gallery_labels=torch.tensor([0, 1])), "4 vectors and 2 labels"),
        (dict(ranks=(0, 1)), "--rank 0"),
        (dict(query_labels=torch.tensor([5, 5, 5, 5])), "no query has"),
    ],
)
def test_what_cannot_be_measured_is_one_line(change, reason):
    labels = torch.tensor([0, 1, 0, 1])
    call = dict(query=vectors(4), query_labels=labels, gallery=vectors(4), gallery_labels=labels, ranks=(1,))
    with pytest.raises(UserError, match=reason) as caught:
        retrieval_metrics(**{**call, **change})
    assert "\n" not in str(caught.value)


def test_large_classes_are_measured_in_parts(monkeypatch):
    """A set of few large classes has more pairs of a query and a positive than fit in memory."""
    gallery = vectors(200)
    labels = torch.arange(200) // 150
    own = torch.arange(200)
    whole = retrieval_metrics(gallery, labels, gallery, labels, (1, 8), exclude=own)
    torchs = retrieval_metrics(gallery, labels, gallery, labels, (1, 8), exclude=own, backend="torch")
    monkeypatch.setattr(measure, "PAIRS", 8000)
    assert len(measure.PositivesByLabel(gallery, labels, gallery, labels, (1, 8), own).parts) > 2
    assert retrieval_metrics(gallery, labels, gallery, labels, (1, 8), exclude=own) == whole
    assert retrieval_metrics(gallery, labels, gallery, labels, (1, 8), exclude=own, backend="torch") == torchs
