"""Means over queries and classes, what a cut ranking leaves out, and bootstrap intervals."""

import numpy as np
import pytest
import torch

from fastirt.errors import UserError
from fastirt.retrieval.metrics import QueryMetrics, summarize
from fastirt.retrieval.metrics.bootstrap import bootstrap_intervals
from tests.retrieval.test_per_query import made_up

ALL_RANKS = {"map", "map_trapezoid", "mrr", "minp", "median_rank"}


def means(ranks, ks, *rest, **options):
    return summarize(QueryMetrics.of_ranks(ranks, ks, int(ranks.counts.max())), *rest, **options)


def test_classes_weigh_the_same_and_queries_without_positives_do_not_count():
    ranks = made_up([1], [1, 2], [3], [], [5], [])
    labels = torch.tensor([7, 7, 7, 7, 2, 4])
    found = means(ranks, (1, 3))
    assert (found["queries"], found["unmatched"]) == (4, 2)
    assert (found["recall@1"], found["recall@3"], found["median_rank"]) == (2 / 4, 3 / 4, 2)
    by_class = means(ranks, (1, 3), labels, "class")
    assert by_class["recall@1"] == pytest.approx((2 / 3 + 0) / 2) and by_class["recall@3"] == (1 + 0) / 2
    assert by_class["mrr"] == pytest.approx(((1 + 1 + 1 / 3) / 3 + 1 / 5) / 2)
    assert (by_class["queries"], by_class["median_rank"]) == (4, 2)
    one = means(ranks, (1,), torch.zeros(6, dtype=torch.int64), "class")
    assert one["map"] == pytest.approx(found["map"]) and one["ci95_low_recall@1"] == one["recall@1"]
    with pytest.raises(UserError, match="no query"):
        means(made_up([], []), (1,))
    with pytest.raises(ValueError, match="use one of query, class"):
        means(ranks, (1,), labels, "image")
    with pytest.raises(ValueError, match="labels"):
        means(ranks, (1,), average="class")


def test_a_ranking_to_a_depth_has_what_the_depth_decides():
    whole = means(made_up([1, 5], [2, 4], [7]), (4, 1, 4, 9))
    assert list(whole)[:4] == ["recall@1", "recall@4", "recall@9", "map@r"]
    assert ALL_RANKS < set(whole)
    unranked = 2**62
    cut = means(made_up([1, unranked], [2, 4], [unranked], depth=4), (1, 4, 9))
    missing = ALL_RANKS | {f"{name}@9" for name in ("recall", "precision", "mp", "map")}
    assert set(whole) - set(cut) == missing and set(cut) < set(whole)
    assert {name: whole[name] for name in cut} == cut
    shallow = means(made_up([1, unranked, unranked], depth=2), (1,))
    assert not {"map@r", "r_precision", "ci95_low_map@r"} & set(shallow)


def test_intervals_are_those_of_resampled_means_and_repeat():
    values = torch.rand(200, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2
    ends = bootstrap_intervals(values)
    assert torch.equal(ends, bootstrap_intervals(values)) and not torch.equal(ends, bootstrap_intervals(values, seed=1))
    rng = np.random.default_rng(0)
    means = np.stack([values.numpy()[rng.integers(200, size=200)].mean(axis=0) for _ in range(1000)])
    np.testing.assert_allclose(ends.numpy(), np.quantile(means, (0.025, 0.975), axis=0).T, rtol=1e-12)
    normal = 1.96 * values.std(dim=0) / 200**0.5  # the central limit theorem's half width
    torch.testing.assert_close((ends[:, 1] - ends[:, 0]) / 2, normal, rtol=0.08, atol=0)
    assert bootstrap_intervals(torch.full((1, 1), 0.25, dtype=torch.float64)).tolist() == [[0.25, 0.25]]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Recall of 300 queries, in truth 0.8, drawn 200 times: 190 times by expectation."""
    draws = (np.random.default_rng(5).random((300, 200)) < 0.8).astype(float)
    low, high = bootstrap_intervals(torch.from_numpy(draws)).T
    assert 180 <= int(((low <= 0.8) & (high >= 0.8)).sum()) <= 200


def test_sizes_of_a_whole_test_set():
    """60,502 queries in classes of two to twelve images, ranks drawn at random."""
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(1, 12, 60_502))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    queries = torch.arange(60_502).repeat_interleave(counts)
    dozens = torch.from_numpy((rng.random(len(queries)) ** 8 * 5_000).astype(np.int64))
    drawn = dozens * 12 + torch.arange(len(queries)) % 12 + 1  # all different in a query
    ranks = drawn[(queries * 2**20 + drawn).argsort()]
    found = means(made_up()._replace(ranks=ranks, starts=starts, rows=ranks), (1, 10, 100, 1000))
    assert 0 < found["recall@1"] < found["recall@10"] < found["recall@1000"] < 1
    low, high = found["ci95_low_recall@1"], found["ci95_high_recall@1"]
    assert low < found["recall@1"] < high and high - low < 0.01
    assert found["queries"] == 60_502
