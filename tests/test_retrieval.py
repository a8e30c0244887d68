"""Search and metrics: against pytorch-metric-learning and the definition, with duplicates and ties; the report."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from fastirt.errors import UserError
from fastirt.retrieval import search as search_module
from fastirt.retrieval.compare_runs import compare_runs
from fastirt.retrieval.metrics import retrieval_metrics
from fastirt.retrieval.published_results import PUBLISHED
from fastirt.retrieval.report import table, write_metrics
from fastirt.retrieval.search import search


def vectors(count, dim=8, seed=0):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def neighbours(query, gallery, k, **options):
    parts = list(search(query, gallery, k, **options))
    assert [first for first, _, _ in parts] == list(np.cumsum([0] + [len(i) for _, _, i in parts])[:-1])
    return torch.cat([s for _, s, _ in parts]), torch.cat([i for _, _, i in parts])


def by_definition(query, query_labels, gallery, gallery_labels, ranks, same, own=None):
    """Query by query in float64; ties by gallery row."""
    own = list(range(len(query))) if same else [-1] * len(query) if own is None else own.tolist()
    recalls, precision, average, count = {k: 0 for k in ranks}, 0.0, 0.0, 0
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
    return {
        **{f"recall@{k}": recalls[k] / count for k in ranks},
        "r_precision": precision / count,
        "map@r": average / count,
        "queries": count,
    }


@pytest.mark.parametrize("backend", ["faiss", "torch"])
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
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert ours["unmatched"] == len(query) - ours["queries"] > 0 and ours["gallery"] == 60


@pytest.mark.parametrize("same", [True, False])
def test_metrics_equal_pytorch_metric_learning(same):
    labels = torch.arange(120) % 15
    gallery = F.normalize(vectors(120, 16) + 0.4 * vectors(15, 16, seed=3)[labels], dim=1)
    query, query_labels = (
        (gallery, labels)
        if same
        else (F.normalize(vectors(40, 16, seed=5) + vectors(15, 16, seed=3)[labels[:40]], dim=1), labels[:40])
    )
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    theirs = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu")).get_accuracy(
        query, query_labels, gallery, labels, ref_includes_query=same
    )
    ours = retrieval_metrics(query, query_labels, gallery, labels, (1,), exclude_self=same)
    assert [ours["recall@1"], ours["r_precision"], ours["map@r"]] == pytest.approx(
        [theirs[name] for name in names], abs=1e-9
    )


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_ties_go_by_gallery_row_also_at_the_last_place(backend):
    axis = torch.eye(4)
    gallery = torch.cat([axis[0].expand(20, 4), axis[1].expand(5, 4)])
    _, indices = neighbours(axis[:1], gallery, 3, backend=backend)
    assert indices.tolist() == [[0, 1, 2]]
    _, indices = neighbours(gallery, gallery, 4, exclude_self=True, backend=backend)
    assert (
        indices[0].tolist() == [1, 2, 3, 4]
        and indices[2].tolist() == [0, 1, 3, 4]
        and indices[19].tolist() == [0, 1, 2, 3]
    )
    assert indices[21].tolist() == [20, 22, 23, 24]


def test_backends_and_chunks_agree(monkeypatch):
    gallery = vectors(300, 24)
    whole = neighbours(gallery, gallery, 7, exclude_self=True, backend="faiss")
    monkeypatch.setattr(search_module, "CHUNK_VALUES", 1500)
    for backend in ("faiss", "torch"):
        similarities, indices = neighbours(gallery, gallery, 7, exclude_self=True, backend=backend)
        assert torch.equal(indices, whole[1])
        torch.testing.assert_close(similarities, whole[0])


def test_what_is_held_at_once_is_bounded():
    query = vectors(5000, 4)
    sizes = [indices.numel() for _, _, indices in search(query, query[:3000], 2500, backend="torch")]
    assert len(sizes) > 1 and max(sizes) <= search_module.CHUNK_VALUES


def test_a_missing_faiss_is_said_and_replaced(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with caplog.at_level("INFO", logger="fastirt"):
        neighbours(vectors(5), vectors(9), 2)
    assert "plain torch" in caplog.text


def test_k_larger_than_the_gallery_and_no_match_at_all():
    z, labels = vectors(5), torch.arange(5)
    with pytest.raises(UserError, match="only 4 images beside the query"):
        retrieval_metrics(z, labels, z, labels, (5,), exclude_self=True)
    with pytest.raises(UserError, match="no query"):
        retrieval_metrics(z, labels, z, labels, (1,), exclude_self=True)


def test_published_rows_are_complete_and_stand_beside_a_run():
    assert {name: len(rows) for name, rows in PUBLISHED.items()} == {"sop": 8, "cub200": 8, "inshop": 8}
    metrics = {
        "recall@1": 0.7,
        "recall@2": 0.8,
        "recall@4": 0.9,
        "recall@8": 0.95,
        "map@r": 0.3,
        "r_precision": 0.4,
        "queries": 5924,
        "gallery": 5924,
        "unmatched": 2,
        "bad": 1,
    }
    text = table(metrics, "cub200", "irt-r", "deit_small_patch16_224", "paper")
    lines = text.splitlines()
    assert len(lines) == 2 + 1 + 8 + 1 and len({len(line) for line in lines[:-1]}) == 1
    assert "70.00" in lines[2] and "73.73" in text and "94.65" in text
    assert "2 queries without a match" in text and "1 unreadable" in text
    assert len(table(metrics, "folder", "irt-o", "m", "paper").splitlines()) == 4


def test_runs_side_by_side(tmp_path):
    for name, value in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        write_metrics(tmp_path / name / "metrics.json", {"recall@1": value, "map@r": 0.1, "queries": 3})
    (tmp_path / "b/config.json").write_text(json.dumps({"config": {"method": "irt-l", "recipe": "paper"}}))
    text = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert "25.00" in text and "irt-l (paper)" in text
    with pytest.raises(UserError, match="no metrics.json"):
        compare_runs([tmp_path])


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_a_query_that_is_in_the_gallery_does_not_find_itself(backend, seed):
    """Some queries are gallery rows under another place, some are not; duplicates of theirs stay."""
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
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    with pytest.raises(UserError, match="--rank 50.* at most 49"):
        retrieval_metrics(query, query_labels, gallery, labels, (50,), exclude=own)
    nobody = torch.full_like(own, -1)
    assert retrieval_metrics(query, query_labels, gallery, labels, (50,), exclude=nobody)["recall@50"] <= 1


def test_each_k_counts_once_and_in_order():
    query, labels = vectors(6), torch.tensor([0, 0, 1, 1, 2, 2])
    metrics = retrieval_metrics(query, labels, query, labels, (2, 1, 1, 2, 2), exclude_self=True)
    assert [name for name in metrics if name.startswith("recall")] == ["recall@1", "recall@2"]
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
