"""Ranks of positives: every backend against the definition, with ties, copies, junk and borders."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastirt.kernels import similarity_error
from fastirt.retrieval import counting, rank_backends
from fastirt.retrieval.positives import UNRANKED, RowLists
from fastirt.retrieval.ranks import positive_ranks, reference_ranks, shared_ranks
from fastirt.retrieval.search import Faiss
from tests.retrieval.vectors import vectors

BACKENDS = ["ranks", "faiss", "torch"]
QUERIES, GALLERY, DIM = 60, 300, 24


def clustered(classes, count=GALLERY, dim=DIM):
    """(unit vectors (count, dim), labels (count,)), classes of unequal sizes."""
    generator = torch.Generator().manual_seed(classes)
    labels = (torch.rand(count, generator=generator) ** 2 * classes).long()
    noise = torch.randn(count, dim, generator=generator)
    return F.normalize(torch.randn(classes, dim, generator=generator)[labels] + noise, dim=1), labels


def collapsed(kind):
    """Vectors among which rounding could decide nearly all, or exact ties do."""
    plain = vectors(GALLERY, DIM)
    copies = plain[torch.arange(GALLERY) % 40]
    return {
        "copies": copies,
        "one vector": plain[:1].expand(GALLERY, DIM).clone(),
        "nearly one vector": F.normalize(plain[:1] + 1e-6 * plain, dim=1),
        "zeros": torch.zeros(GALLERY, DIM),
        "one-hot": torch.eye(DIM)[torch.arange(GALLERY) * 7 % DIM],
        "small whole numbers": torch.randint(-1, 2, (GALLERY, DIM), generator=torch.Generator().manual_seed(1)).float(),
        "long and short": plain * torch.linspace(1e-3, 30, GALLERY)[:, None],
    }[kind]


def assert_ranks(found, expected, depth=None):
    assert torch.equal(found.starts, expected.starts) and torch.equal(found.rows, expected.rows)
    ranks = expected.ranks if depth is None else torch.where(expected.ranks <= depth, expected.ranks, UNRANKED)
    assert torch.equal(found.ranks, ranks)


def check_all(query, gallery, positives, ignored=None):
    expected = reference_ranks(query, gallery, positives, ignored)
    for backend in BACKENDS:
        assert_ranks(positive_ranks(query, gallery, positives, ignored, backend=backend), expected)
        for depth in (1, 20):
            found = positive_ranks(query, gallery, positives, ignored, backend=backend, depth=depth)
            assert found.depth == (None if backend == "ranks" else depth)
            assert_ranks(found, expected, found.depth)


def test_the_definition_by_hand():
    query = torch.tensor([[1.0, 0], [0, 1]])
    gallery = torch.tensor([[0.0, 1], [1, 0], [0.6, 0.8], [1, 0], [0.8, 0.6]])
    positives = RowLists.of_lists([[3, 2], [4]])
    found = reference_ranks(query, gallery, positives)
    assert found.ranks.tolist() == [2, 4, 3] and found.rows.tolist() == [3, 2, 4]
    ignored = RowLists.of_lists([[1, 4], [0, 4]])  # row 4 is a positive of query 1, and ignored
    found = positive_ranks(query, gallery, positives, ignored)
    assert found.ranks.tolist() == [1, 2] and found.counts.tolist() == [2, 0]


@pytest.mark.parametrize("classes", [1, 5, 100, GALLERY])
@pytest.mark.parametrize("dim", [3, DIM])
def test_ranks_of_clusters_of_all_sizes(classes, dim):
    vectors, labels = clustered(classes, dim=dim)
    check_all(vectors, vectors, RowLists.of_labels(labels, labels), RowLists.of_column(torch.arange(GALLERY)))


@pytest.mark.parametrize(
    "kind",
    ["copies", "one vector", "nearly one vector", "zeros", "one-hot", "small whole numbers", "long and short"],
)
def test_ties_go_by_gallery_row(kind):
    gallery, labels = collapsed(kind), torch.arange(GALLERY) % 30
    query = gallery[:QUERIES]
    check_all(query, gallery, RowLists.of_labels(labels[:QUERIES], labels), RowLists.of_column(torch.arange(QUERIES)))


@pytest.mark.parametrize("tile", [1, 64, 299])
@pytest.mark.parametrize("dense", [0, 16])
def test_borders_of_tiles_and_blocks_change_nothing(tile, dense, monkeypatch):
    for name, value in (("TILE", tile), ("SORTED_TILE", tile + 1), ("DENSE", dense), ("LISTED", 7)):
        monkeypatch.setattr(counting, name, value)
    for name in ("BLOCK", "SEARCH_BLOCK"):
        monkeypatch.setattr(rank_backends, name, 13)
    vectors, labels = clustered(20)
    gallery = vectors.clone()
    gallery[200:] = vectors[:100]
    junk = RowLists.of_lists([np.random.default_rng(i).permutation(GALLERY)[:20].tolist() for i in range(QUERIES)])
    query, labels_of = vectors[:QUERIES], labels[:QUERIES]
    check_all(query, gallery, RowLists.of_labels(labels_of, labels), junk)


def test_a_class_of_5000():
    vectors, labels = clustered(2, 5003, 8)
    labels[:] = 0
    labels[5000:] = 1
    positives = RowLists.of_labels(labels[:3], labels)
    expected = reference_ranks(vectors[:3], vectors, positives)
    assert_ranks(positive_ranks(vectors[:3], vectors, positives), expected)


def test_rounding_of_products_is_within_its_bound():
    """The largest error of float32 products, in units of the bound, at D = 384 and 1,024."""
    for dim in (384, 1024):
        for query in (vectors(300, dim), F.normalize(torch.rand(300, dim), dim=1)):
            gallery = F.normalize(query + 0.1 * vectors(300, dim, 1), dim=1)
            exact = query.double() @ gallery.double().T
            for found in (query @ gallery.T, counting.products(query, gallery)):
                assert (found.double() - exact).abs().max() < 0.5 * counting.rounding(dim)


def test_a_product_beyond_its_bound_is_noticed_at_the_positive(monkeypatch):
    """The positive itself is then outside its bounds: the tile is decided in float64."""
    monkeypatch.setattr(counting, "products", lambda a, b: (a.bfloat16() @ b.bfloat16().T).float() * 1.01)
    gallery, labels = clustered(20)
    positives = RowLists.of_labels(labels, labels)
    assert_ranks(positive_ranks(gallery, gallery, positives), reference_ranks(gallery, gallery, positives))


def test_vectors_that_are_not_finite_are_refused():
    gallery, positives = vectors(10), RowLists.of_lists([[1], [2]])
    for value in (float("nan"), float("inf"), 1e38):
        for bad in (0, 1):
            pair = [gallery[:2].clone(), gallery.clone()]
            pair[bad][1, 1] = value
            with pytest.raises(ValueError, match="must be finite"):
                positive_ranks(*pair, positives)


def test_queries_without_positives_have_no_ranks():
    found = positive_ranks(vectors(3), vectors(5), RowLists.of_lists([[], [2], []]))
    assert found.counts.tolist() == [0, 1, 0]
    found = positive_ranks(vectors(3), vectors(5), RowLists.of_lists([[], [], []]))
    assert found.ranks.tolist() == [] and found.starts.tolist() == [0, 0, 0, 0]
    assert positive_ranks(vectors(0), vectors(5), RowLists.of_lists([])).ranks.tolist() == []


def test_shards_of_the_gallery_add_up(monkeypatch):
    """As over several GPUs: each part counts its rows."""
    gallery, labels = clustered(5)
    positives = RowLists.of_labels(labels, labels)
    split = rank_backends.Counting.__init__

    def init(self, gallery, device, gpus):
        split(self, gallery, device, gpus)
        self.parts = [(0, gallery[:7]), (7, gallery[7:200]), (200, gallery[200:])]

    monkeypatch.setattr(rank_backends.Counting, "__init__", init)
    assert_ranks(positive_ranks(gallery, gallery, positives), reference_ranks(gallery, gallery, positives))


@pytest.mark.parametrize("after", [0, 2])
def test_a_faiss_that_fails_during_the_search_is_replaced(after, monkeypatch, caplog):
    monkeypatch.setattr(rank_backends, "SEARCH_BLOCK", 30)
    gallery, labels = clustered(5)
    positives, calls, whole = RowLists.of_labels(labels, labels), [], Faiss.__call__

    def failing(self, part, k):
        calls.append(k)
        if len(calls) > after:
            raise RuntimeError("Error in GpuIndex: out of temporary memory\nat line 7")
        return whole(self, part, k)

    monkeypatch.setattr(Faiss, "__call__", failing)
    found = positive_ranks(gallery, gallery, positives, backend="faiss", depth=9)
    assert_ranks(found, reference_ranks(gallery, gallery, positives), 9)
    assert len(calls) == after + 1
    assert caplog.text.count("out of temporary memory") == 1 and "exact ranks take over" in caplog.text


def test_threads_are_released_and_their_number_restored():
    before = torch.get_num_threads()
    gallery, labels = clustered(5)
    positives = RowLists.of_labels(labels, labels)
    torch.set_num_threads(2)
    try:
        expected = positive_ranks(gallery, gallery, positives)
        assert torch.get_num_threads() == 2
        assert not [thread for thread in threading.enumerate() if "fastirt-ranks" in thread.name]
        torch.set_num_threads(1)
        assert_ranks(positive_ranks(gallery, gallery, positives), expected)
    finally:
        torch.set_num_threads(before)


class ThreadHost:
    """Stands for a rank's HostChannel; the ranks are threads."""

    def __init__(self, rank, world_size, barrier, desk):
        self.rank, self.world_size, self.barrier, self.desk = rank, world_size, barrier, desk

    def gather_json(self, value):
        self.desk[self.rank] = value
        self.barrier.wait()
        values = list(self.desk)
        self.barrier.wait()
        return values

    def broadcast(self, tensor):
        return self.gather_json(tensor)[0].clone()

    def gather_rows(self, own):
        values = self.gather_json(own)
        return torch.cat(values) if self.rank == 0 else None


@pytest.mark.parametrize("backend", ["ranks", "faiss"])
@pytest.mark.parametrize("queries", [2, 50])
def test_ranks_share_the_queries(backend, queries):
    """Also where a rank has no query, or none with a positive."""
    gallery, labels = clustered(20)
    positives = RowLists.of_labels(labels[:queries], labels)
    positives = positives.without(
        RowLists.of_lists([positives.rows[: positives.starts[1]].tolist()] + [[]] * (queries - 1))
    )
    ignored = RowLists.of_column(torch.arange(queries))
    barrier, desk, found = threading.Barrier(3), [None] * 3, [None] * 3

    def work(rank):
        mine = (gallery[:queries], gallery, positives, ignored) if rank == 0 else (None,) * 4
        found[rank] = shared_ranks(ThreadHost(rank, 3, barrier, desk), *mine, backend=backend, depth=9)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = reference_ranks(gallery[:queries], gallery, positives, ignored)
    assert found[1:] == [None, None]
    assert found[0].depth == (9 if backend == "faiss" else None)
    assert_ranks(found[0], expected, found[0].depth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_collapsed_embeddings_are_not_compared_pair_by_pair(backend, monkeypatch):
    pairs, compare = [], counting.pair_similarities
    monkeypatch.setattr(counting, "pair_similarities", lambda *a: pairs.append(len(a[3])) or compare(*a))
    gallery, labels = collapsed("nearly one vector"), torch.arange(GALLERY) % 30
    positives = RowLists.of_labels(labels, labels)
    assert_ranks(
        positive_ranks(gallery, gallery, positives, backend=backend), reference_ranks(gallery, gallery, positives)
    )
    assert sum(pairs) < 10 * GALLERY  # of GALLERY x GALLERY


def test_row_lists():
    lists = RowLists.of_labels(torch.tensor([1, 0, 2]), torch.tensor([0, 1, 1, 3, 0]))
    assert lists.rows.tolist() == [1, 2, 0, 4] and lists.counts.tolist() == [2, 2, 0]
    assert lists.places(torch.tensor([2, 1])).tolist() == [[-1, -1], [2, 3]]
    own = RowLists.of_column(torch.tensor([2, -1, 0]))
    assert own.rows.tolist() == [2, 0] and own.counts.tolist() == [1, 0, 1]
    assert lists.without(own).rows.tolist() == [1, 0, 4]
    assert lists.without(own).counts.tolist() == [1, 2, 0]


@pytest.mark.parametrize("kind", ["clusters", "copies", "nearly one vector"])
def test_the_path_of_a_gpu_decides_what_its_counts_leave_open(kind, monkeypatch):
    """With the kernel's plain twin: rows in doubt are counted again in float64."""
    gallery, labels = clustered(20)
    gallery = gallery if kind == "clusters" else collapsed(kind)
    positives, split = RowLists.of_labels(labels, labels), rank_backends.Counting.__init__

    def init(self, gallery, device, gpus):
        split(self, gallery, device, gpus)
        self.on_gpu, self.parts = True, [(0, gallery[:100]), (100, gallery[100:])]

    monkeypatch.setattr(rank_backends.Counting, "__init__", init)
    assert_ranks(positive_ranks(gallery, gallery, positives), reference_ranks(gallery, gallery, positives))


def test_a_kernel_that_errs_within_its_bound_changes_no_rank(monkeypatch):
    """Its products are off by nearly its error; also where it counts for a FAISS that failed."""
    gallery, labels = clustered(20)
    gallery[150:] = F.normalize(gallery[:150] + 1e-5 * vectors(150, DIM), dim=1)
    positives, split = RowLists.of_labels(labels, labels), rank_backends.Counting.__init__
    error = 0.9 * similarity_error(DIM)

    def init(self, gallery, device, gpus):
        split(self, gallery, device, gpus)
        self.on_gpu = True

    def noisy(query, part, low, high):
        noise = torch.rand(len(query), len(part), generator=torch.Generator().manual_seed(0)).sub(0.5).sign() * error
        found = (query.double() @ part.double().T + noise).float()[:, None]
        above = (found > high[:, :, None]).sum(2)
        return above, (found >= low[:, :, None]).sum(2) - above

    monkeypatch.setattr(rank_backends.Counting, "__init__", init)
    monkeypatch.setattr(rank_backends, "count_similarities", noisy)
    expected = reference_ranks(gallery, gallery, positives)
    assert_ranks(positive_ranks(gallery, gallery, positives), expected)
    monkeypatch.setattr(Faiss, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    assert_ranks(positive_ranks(gallery, gallery, positives, backend="faiss", depth=200), expected, 200)


def test_other_dtypes_gradients_and_wrong_options():
    gallery, labels = clustered(20)
    positives = RowLists.of_labels(labels, labels)
    expected = positive_ranks(gallery, gallery, positives)
    assert_ranks(positive_ranks(gallery.double(), gallery.clone().requires_grad_(), positives), expected)
    assert positive_ranks(gallery.bfloat16(), gallery.bfloat16(), positives).ranks.shape == expected.ranks.shape
    with pytest.raises(ValueError, match="backend 'rank': choose one of auto"):
        positive_ranks(gallery, gallery, positives, backend="rank")
    with pytest.raises(ValueError, match="vanish"):
        positive_ranks(1e-21 * gallery, gallery, positives)
    assert RowLists.of_lists([[3, 1, 3]]).rows.tolist() == [1, 3]
