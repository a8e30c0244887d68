"""Metrics of each query: worked by hand, against a plain loop, and where nothing is found."""

import math
from fractions import Fraction

import pytest
import torch

from fastirt.retrieval.metrics import per_query
from fastirt.retrieval.positives import UNRANKED, PositiveRanks, RowLists

# Rankings of ten images: positives and junk to AP by trapezoids, and precision at 1, 5 and 10.
BACKWARD = [7, 3, 0, 8, 1, 2, 9, 4, 5, 6]
MIXED = [0, 1, 5, 2, 4, 3, 6, 7, 8, 9]
WORKED = {
    "A": (list(range(10)), {0, 2, 5}, set(), "61/90", "1 2/5 1/2"),
    "B": (BACKWARD, {0, 1, 4}, {7, 8}, "77/180", "0 2/5 1/2"),
    "C": ([9, 8, 7, 0, 1, 2, 3, 4, 5, 6], {0, 1}, set(), "9/40", "0 2/5 2/5"),
    "D": ([5, 0, 6, 1, 7, 8], {0, 1, 2}, {6}, "5/18", "0 2/3 2/3"),  # image 2 is not ranked
    "E": ([4, 2, 0, 1, 3, 5, 6, 7, 8, 9], {2, 0}, {4}, "1", "1 1 1"),
    "F easy": (MIXED, {1, 4}, {0} | {2, 7}, "19/24", "1 2/3 2/3"),
    "F medium": (MIXED, {1, 4, 2, 7}, {0}, "475/672", "1 3/5 4/7"),
    "F hard": (MIXED, {2, 7}, {0} | {1, 4}, "23/80", "0 2/5 2/5"),
}


def ranks_of(rankings, positives, ignored=None):
    ignored = ignored or [[]] * len(rankings)
    return PositiveRanks.of_rankings(rankings, RowLists.of_lists(positives), RowLists.of_lists(ignored))


def made_up(*ranks, depth=None):
    """Ranks of one query after the other."""
    counts = torch.tensor([0, *map(len, ranks)])
    flat = torch.tensor([rank for each in ranks for rank in each], dtype=torch.int64)
    return PositiveRanks(flat, counts.cumsum(0), flat - 1, depth)


def as_fractions(values):
    return [Fraction(value).limit_denominator(10_000) for value in values.tolist()]


def test_worked_values():
    rankings, positives, junk, average, precisions = zip(*WORKED.values())
    ranks = ranks_of(rankings, positives, junk)
    found = per_query.average_precision_trapezoid(ranks)
    assert as_fractions(found) == [Fraction(value) for value in average]
    assert found.tolist() == pytest.approx([float(Fraction(value)) for value in average], abs=1e-15)
    for place, k in enumerate((1, 5, 10)):
        expected = [Fraction(each.split()[place]) for each in precisions]
        assert as_fractions(per_query.bounded_precision(ranks, k)) == expected


def test_every_other_metric_of_a_worked_ranking():
    """Positives at ranks 2, 3 and 6 of ten: R = 3."""
    ranks = ranks_of([list(range(10))], [[1, 2, 5]])
    expected = {
        "average_precision": "5/9",  # (1/2 + 2/3 + 3/6) / 3
        "average_precision_at_r": "7/18",
        "r_precision": "2/3",
        "reciprocal_rank": "1/2",
        "inverse_negative_penalty": "1/2",
        "first_rank": "2",
    }
    for name, value in expected.items():
        assert as_fractions(getattr(per_query, name)(ranks)) == [Fraction(value)], name
    at = {
        "recall": "0 1 1",
        "precision": "0 1/2 1/2",
        "average_precision": "0 1/4 7/18",
        "bounded_precision": "0 1/2 1/2",
    }
    for name, values in at.items():
        for k, value in zip((1, 2, 4), values.split()):
            assert as_fractions(getattr(per_query, name)(ranks, k)) == [Fraction(value)], (name, k)
    assert as_fractions(per_query.average_precision(ranks, 1000)) == [Fraction(5, 9)]


def by_loop(ranks, k):
    """All metrics of one query with positives, from its list of ranks (infinite: not found)."""
    r, pairs = len(ranks), list(enumerate(ranks, 1))
    ranked = [rank for rank in ranks if rank < math.inf]
    bound = min(k, ranked[-1]) if ranked else k
    before = [1.0 if rank == 1 else (j - 1) / (rank - 1) for j, rank in pairs]
    return {
        "recall": float(ranks[0] <= k),
        "precision": sum(rank <= k for rank in ranks) / k,
        "bounded_precision": sum(rank <= bound for rank in ranks) / bound,
        "average_precision at k": sum(j / rank for j, rank in pairs if rank <= k) / min(k, r),
        "average_precision": sum(j / rank for j, rank in pairs) / r,
        "average_precision_at_r": sum(j / rank for j, rank in pairs if rank <= r) / r,
        "average_precision_trapezoid": sum((p + j / rank) / 2 for p, (j, rank) in zip(before, pairs) if rank < math.inf)
        / r,
        "r_precision": sum(rank <= r for rank in ranks) / r,
        "reciprocal_rank": 1 / ranks[0],
        "inverse_negative_penalty": r / ranks[-1],
        "first_rank": ranks[0],
    }


def test_metrics_equal_a_plain_loop():
    """Queries of 0 to 12 positives, of which some are not ranked, one of 5,000 and one without any
    found."""
    draw = torch.Generator().manual_seed(0)
    lists = [torch.randperm(40, generator=draw)[: i % 13].add(1).sort().values.tolist() for i in range(80)]
    for each in lists[::3]:
        each[len(each) // 2 + 1 :] = [UNRANKED] * len(each[len(each) // 2 + 1 :])
    lists += [torch.randperm(9000, generator=draw)[:5000].add(1).sort().values.tolist(), [UNRANKED] * 3]
    ranks = made_up(*lists)
    for k in (1, 3, 10, 6000):
        found = {name: getattr(per_query, name)(ranks, k) for name in ("recall", "precision", "bounded_precision")}
        found["average_precision at k"] = per_query.average_precision(ranks, k)
        for name in by_loop([1], 1):
            values = found[name] if name in found else getattr(per_query, name)(ranks)
            assert values.shape == (len(lists),) and values.dtype == torch.float64
            for each, value in zip(lists, values.tolist()):
                if not each:
                    assert math.isnan(value), name
                else:
                    each = [math.inf if rank == UNRANKED else rank for rank in each]
                    assert value == pytest.approx(by_loop(each, k)[name], rel=1e-12), (name, k, each)


def test_the_last_positive_of_a_ranking_that_is_known_to_a_depth_is_deeper():
    """Nothing is left out of such a ranking, so mP@5 counts five images."""
    assert per_query.bounded_precision(made_up([2, UNRANKED]), 5).tolist() == [0.5]
    assert per_query.bounded_precision(made_up([2, UNRANKED], depth=5), 5).tolist() == [0.2]


@pytest.mark.parametrize("lists", [[], [[]], [[], []]])
def test_no_queries_and_no_positives(lists):
    ranks = made_up(*lists)
    for name in ("average_precision_trapezoid", "reciprocal_rank", "inverse_negative_penalty", "r_precision"):
        values = getattr(per_query, name)(ranks)
        assert len(values) == len(lists) and values.isnan().all(), name
    assert per_query.recall(ranks, 1).isnan().all() and per_query.bounded_precision(ranks, 1).isnan().all()
