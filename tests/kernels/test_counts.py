"""Counts of similarities beside thresholds: kernel and plain twin against float64.

On a GPU each D, rounded up to 32, and each number of thresholds, to 4, is a kernel to compile.
"""

import pytest
import torch
import torch.nn.functional as F

from fastirt.kernels import count_similarities, similarity_error
from fastirt.kernels.counts import similarities
from fastirt.kernels.counts.kernel import MOST_COLUMNS
from fastirt.kernels.variants.tile_table import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter
INF, NAN = float("inf"), float("nan")


def unit_vectors(count, dim, seed):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def bands(query, gallery, width, error):
    """(low, high, exact): bands around `width` of the exact similarities of each query."""
    exact = query.double() @ gallery.double().T
    picks = torch.arange(len(query))[:, None] * 7 + torch.arange(width)
    own = exact.float().gather(1, picks % len(gallery))
    return own - error, own + error, exact


def count(query, gallery, low, high, impl="triton"):
    found = count_similarities(*(value.to(DEVICE) for value in (query, gallery, low, high)), impl=impl)
    assert all(value.dtype == torch.int32 and value.shape == low.shape for value in found)
    return found.above.cpu(), found.within.cpu()


def assert_within_the_error(found, low, high, exact, error):
    """Counts are those of similarities that deviate by at most `error`."""
    above, within = found
    exact = exact[:, None]
    least, most = ((exact > high[..., None] + shift).sum(2) for shift in (error, -error))
    assert ((least <= above) & (above <= most)).all()
    least, most = ((exact >= low[..., None] + shift).sum(2) for shift in (error, -error))
    assert ((least <= above + within) & (above + within <= most)).all()


@pytest.mark.parametrize(
    "queries, rows, dim, width, scale",
    [(1, 1, 33, 1, 1.0), (131, 257, 100, 14, 1.0), (5, 129, 384, 12, 2.0**-30), (3, 40, 384, 100, 3e8)],
)
def test_counts_are_those_of_float64_up_to_the_error(queries, rows, dim, width, scale):
    """Bands of the error around a positive hold it: the counts above and below are certain."""
    query, gallery = unit_vectors(queries, dim, 0) * scale, unit_vectors(rows, dim, 1)
    error = similarity_error(dim) * scale * (1 + 1e-6)
    low, high, exact = bands(query, gallery, width, error)
    for impl in ("triton", "reference"):
        found = count(query, gallery, low, high, impl)
        assert (found[1] >= 1).all(), "a positive is outside its band"
        assert_within_the_error(found, low, high, exact, error)


def test_operands_without_their_low_parts_exceed_the_error(monkeypatch):
    split = similarities.split_halves

    def rounded(vectors, rows):
        halves, scale = split(vectors, rows)
        halves[1] = 0
        return halves, scale

    monkeypatch.setattr(similarities, "split_halves", rounded)
    with pytest.raises(AssertionError, match="outside its band"):
        test_counts_are_those_of_float64_up_to_the_error(131, 257, 100, 14, 1.0)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_ties_are_within_a_band_without_width(impl):
    """Similarities of these vectors are exact; identical rows are equally similar."""
    gallery = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [-1.0, 1.0], [0.5, 0.5]])
    query = torch.tensor([[1.0, 0.0], [-0.5, -0.5]])
    exact = torch.tensor([[0.5, 1.0, 0.0], [-0.5, 0.0, 0.25]])
    above, within = count(query, gallery, exact, exact, impl)
    assert above.tolist() == [[1, 0, 4], [1, 0, 0]]
    assert within.tolist() == [[3, 1, 0], [4, 1, 0]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_infinities_and_nan(impl):
    gallery = torch.tensor([[1.0, 0.0], [NAN, 1.0], [0.0, -INF], [0.6, 0.8]])
    query = torch.tensor([[1.0, 0.0], [INF, 0.0], [0.0, NAN], [0.0, 0.0]])
    low = torch.tensor([[INF, NAN, -INF, -INF]]).repeat(4, 1)
    high = torch.tensor([[INF, NAN, INF, 0.8]]).repeat(4, 1)
    above, within = count(query, gallery, low, high, impl)
    assert above.tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4, [0] * 4]
    assert within.tolist() == [[0, 0, 2, 1], [0] * 4, [0] * 4, [0, 0, 2, 2]]


@pytest.mark.parametrize("rounds", [0, 16], ids="{} rounds".format)
def test_shards_of_a_gallery_add_up(rounds, monkeypatch):
    """As on several GPUs; with one program for the whole gallery, and with one for each tile."""
    monkeypatch.setattr(similarities, "ROUNDS", rounds)
    query, gallery = unit_vectors(40, 30, 0), unit_vectors(700, 30, 1)
    low, high, exact = bands(query, gallery, 3, 1e-4)
    whole = count(query, gallery, low, high)
    parts = [count(query, part, low, high) for part in gallery.split([130, 1, 569])]
    assert all(torch.equal(sum(part), one) for part, one in zip(zip(*parts), whole))
    assert_within_the_error(whole, low, high, exact, similarity_error(30))


def test_a_program_counts_at_most_what_16_bits_hold(monkeypatch):
    monkeypatch.setattr(similarities, "ROUNDS", 0)  # few programs, each of as many rows as it may have
    gallery = torch.ones(MOST_COLUMNS + 1000, 2)
    above, within = count(gallery[:1], gallery, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    assert above.tolist() == [[len(gallery), 0]] and within.tolist() == [[0, len(gallery)]]
    monkeypatch.undo()
    tile = Tile(128, 64, 32, 8, 4)
    for columns in (1, 10, 10**5, 10**7):
        for rows in (1, 500, 10**6):
            tiles = similarities.tiles_per_program(columns, rows, 132, tile)
            assert 1 <= tiles <= min(columns, MOST_COLUMNS // 64)
    # 60,502 queries and gallery rows: sixteen programs and more for each multiprocessor
    assert 473 * -(-946 // similarities.tiles_per_program(946, 473, 132, tile)) >= 16 * 132


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=str)
def test_nothing_to_count(shape):
    queries, rows, width = shape
    thresholds = torch.zeros(queries, width)
    for impl in ("triton", "reference"):
        assert not any(
            value.any() for value in count(torch.ones(queries, 2), torch.ones(rows, 2), *[thresholds] * 2, impl)
        )


def test_views_and_other_dtypes():
    query, gallery = unit_vectors(6, 30, 0), unit_vectors(20, 30, 1).bfloat16()
    low, high, _ = bands(query, gallery.float(), 3, 1e-4)
    expected = count(query, gallery.float(), low, high)
    mirrored = count(query.T.contiguous().T, gallery.repeat(1, 2)[:, :30], low.T.contiguous().T, high)
    assert all(map(torch.equal, mirrored, expected))


def test_a_kernel_that_failed_the_self_check_is_not_used(monkeypatch):
    monkeypatch.setattr(similarities, "triton_or_reference", lambda impl, *_: "triton" if impl == "auto" else impl)
    monkeypatch.setattr(similarities, "count_kernel", None)  # raises when launched
    monkeypatch.setattr(similarities, "REPLACED", {"count_similarities"})
    assert count_similarities(*[torch.ones(1, 2, device=DEVICE)] * 4).above.tolist() == [[1, 1]]


@pytest.mark.parametrize("fault", ["query", "gallery", "low", "high"])
def test_wrong_arguments_are_named(fault):
    given = {name: torch.ones(2, 3, device=DEVICE) for name in ("query", "gallery", "low", "high")}
    shapes = {"query": (3,), "gallery": (2, 4), "low": (3, 3), "high": (2, 2)}
    wrong = {name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"^{fault}: "):
        count_similarities(*{**given, fault: wrong[fault]}.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_wait_for_the_device():
    query, gallery = unit_vectors(300, 384, 0).to(DEVICE), unit_vectors(5000, 384, 1).to(DEVICE)
    low, high = torch.zeros(300, 12, device=DEVICE), torch.full((300, 12), 0.1, device=DEVICE)
    first = count_similarities(query, gallery, low, high, impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = count_similarities(query, gallery, low, high, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again)) and first.above.any()
