"""An encoder on a catalogue: what is embedded, how, what is left out, and what is refused."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from fastirt.config.options import Config
from fastirt.datasets import Catalog, Split, load_dataset
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.images.source import FileSource
from fastirt.loading import cache_budget
from fastirt.loading.batch import Batch, ImageViews
from fastirt.loading.cache_budget import EvalCaches
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.image_cache import ImageCache
from fastirt.model.encoder import normalization_constants
from fastirt.retrieval.embed import embed
from fastirt.retrieval.evaluate import evaluate
from tests.helpers import needs_dali, write_images

CPU = torch.device("cpu")
CONFIG = Config().replace(
    input_size=16, resize_size=18, loader="pil", num_workers=1, eval_batch_size=7, rank=(1, 2), precision="fp32"
)


class Pixels(nn.Module):
    """Images as their own embeddings; notes how it was called."""

    mean, std, embed_dim = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 3 * 4 * 4

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(
            (
                self.training,
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                images.dtype,
                images.is_contiguous(memory_format=torch.channels_last),
                tuple(images.shape),
            )
        )
        small = nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)
        return nn.functional.normalize(small, dim=1)


class FakeLoader:
    """Rows in batches of 4, padded; `skipped` rows are never yielded."""

    def __init__(self, images, skipped=()):
        self.images, self.closed = images, False
        self.rows = np.array([i for i in range(len(images)) if i not in skipped])

    def __iter__(self):
        for step, first in enumerate(range(0, len(self.rows), 4)):
            rows = self.rows[first : first + 4]
            padded = np.concatenate([rows, np.full(4 - len(rows), -1)])
            images = torch.where(torch.from_numpy(padded >= 0)[:, None, None, None], self.images[padded], 0)
            yield Batch(ImageViews.whole(images), torch.zeros(4, dtype=torch.int64), padded, step, len(rows))

    def agree(self):
        assert self.closed

    def close(self):
        self.closed = True


def embedded(encoder, loader, paths, dtype=torch.float32):
    return embed(encoder, loader, paths, mean=encoder.mean, std=encoder.std, device=CPU, dtype=dtype, progress=False)


@pytest.fixture
def images():
    return torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_of_the_readable_rows_in_order_without_padding(images, dtype):
    encoder, loader = Pixels().train(), FakeLoader(images, skipped=(2, 9))
    found = embedded(encoder, loader, [str(i) for i in range(10)], dtype)
    assert found.rows.tolist() == [0, 1, 3, 4, 5, 6, 7, 8] and found.rows.dtype == torch.int64
    assert found.vectors.shape == (8, 48) and found.vectors.dtype == torch.float32
    mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
    whole = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = nn.functional.normalize(nn.functional.adaptive_avg_pool2d(whole, 4).flatten(1), dim=1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.vectors, expected[found.rows], atol=tolerance, rtol=0)
    assert encoder.training and loader.closed
    assert encoder.calls == [(False, True, dtype == torch.bfloat16, dtype, True, (4, 3, 8, 8))] * 2


def test_embeddings_that_are_not_finite_are_refused_by_name(images):
    class Broken(Pixels):
        def forward(self, images):
            out = super().forward(images)
            out[1] = float("nan")
            return out

    encoder, loader = Broken().train(), FakeLoader(images[:8])
    with pytest.raises(UserError, match=r"2 embeddings are not finite, the first of b\.jpg"):
        embedded(encoder, loader, [f"{c}.jpg" for c in "abcdefgh"])
    assert encoder.training and loader.closed


def test_the_mode_comes_back_after_an_error_too_and_nothing_readable_is_an_error(images):
    class Fails(Pixels):
        def forward(self, images):
            raise ValueError("no")

    encoder, loader = Fails().train(), FakeLoader(images)
    with pytest.raises(ValueError):
        embedded(encoder, loader, [""] * 10)
    assert encoder.training and loader.closed
    with pytest.raises(UserError, match="no image could be read"):
        embedded(Pixels(), FakeLoader(images, skipped=range(10)), [""] * 10)


def test_mean_and_std_are_the_models_or_imagenets():
    assert normalization_constants(CONFIG.replace(normalization="model"), Pixels()) == (Pixels.mean, Pixels.std)
    mean, std = normalization_constants(CONFIG.replace(normalization="imagenet"), Pixels())
    assert tuple(mean) == (0.485, 0.456, 0.406) and tuple(std) == (0.229, 0.224, 0.225)


def test_evaluation_of_images_with_bad_ones_and_a_lonely_one(tmp_path, caplog):
    """Images that cannot be read count for nothing; a class that loses its match joins the
    unmatched."""
    write_images(tmp_path / "train", 2, 2)
    write_images(tmp_path / "test", 5, 4, seed=1)
    whole = evaluate(Pixels(), load_dataset("folder", str(tmp_path)), CONFIG, CPU, progress=False)
    assert whole["queries"] == whole["gallery"] == 20 and whole["unmatched"] == whole["bad"] == 0
    assert whole["recall@1"] > 0.5 and whole["recall@2"] >= whole["recall@1"]
    for view in (0, 2, 3):
        (tmp_path / f"test/class03/{view}.jpg").write_bytes(b"not an image")
    os.truncate(tmp_path / "test/class00/1.jpg", 200)
    csv_path = tmp_path / "bad_pictures.csv"
    metrics = evaluate(Pixels(), load_dataset("folder", str(tmp_path)), CONFIG, CPU, csv_path=csv_path, progress=False)
    assert (metrics["bad"], metrics["unmatched"], metrics["queries"], metrics["gallery"]) == (4, 1, 15, 16)
    assert "class03" in csv_path.read_text() and "class00/1.jpg" in csv_path.read_text()
    assert caplog.text.count("class00/1.jpg") == 1


def test_query_and_gallery_apart(tmp_path):
    """In-Shop's kind: the same image in query and gallery is a match, not the query itself."""
    for split, seed in (("train", 1), ("query", 2), ("gallery", 2)):
        write_images(tmp_path / split, 4, 1, seed=seed)
    metrics = evaluate(Pixels(), load_dataset("folder", str(tmp_path)), CONFIG, CPU, progress=False)
    assert metrics["recall@1"] == metrics["map@r"] == 1.0
    assert metrics["queries"] == metrics["gallery"] == 4


def test_a_rank_above_the_gallery_is_refused_before_anything_is_embedded():
    split = Split("test", tuple("abcd"), np.array([0, 0, 1, 1]))
    encoder, catalog = Pixels(), Catalog("csv", "/nowhere", split, split, None, ("a", "b"))
    with pytest.raises(UserError, match="--rank 4.* at most 3"):
        evaluate(encoder, catalog, CONFIG.replace(rank=(1, 4)), CPU, progress=False)
    assert not encoder.calls


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_ranks_share_the_batches_and_read_no_others(tmp_path, size):
    """22 images in batches of 5, on up to more ranks than there are batches."""
    write_images(tmp_path / "train", 2, 2)
    write_images(tmp_path / "test", 11, 2, seed=1)
    split = load_dataset("folder", str(tmp_path)).query
    seen, read = [], []

    class Source(FileSource):
        def read(self, row):
            read.append(row)
            return super().read(row)

    for rank in range(size):
        given = dict(batch_size=5, input=CONFIG.input, device=CPU, store=Source(split.paths), ranks=Ranks(rank, size))
        for batch in EvalLoader(split, **given):
            assert len(batch) == 5  # the same padded size on any number of ranks
            seen += batch.indices[: batch.valid].tolist()
    assert seen == sorted(read) == list(range(22))


@pytest.mark.parametrize("loader", ["pil", pytest.param("dali", marks=needs_dali)])
def test_a_second_evaluation_decodes_nothing_and_sees_the_same_pixels(tmp_path, loader, monkeypatch):
    """A bad image is tried again, as without the cache; with several ranks each keeps its part."""
    for split, seed in (("train", 1), ("query", 2), ("gallery", 3)):
        write_images(tmp_path / split, 5, 4, size=29, seed=seed)
    (tmp_path / "query/class03/2.jpg").write_bytes(b"not an image")
    catalog, config = load_dataset("folder", str(tmp_path)), CONFIG.replace(loader=loader, cache="auto")
    reads, seen = [], []
    read = FileSource.read
    monkeypatch.setattr(FileSource, "read", lambda self, row: reads.append(self.path(row)) or read(self, row))

    class Watched(Pixels):
        def forward(self, images):
            seen.append(images.clone())
            return super().forward(images)

    def run(caches):
        reads.clear()
        seen.clear()
        metrics = evaluate(Watched(), catalog, config, CPU, caches=caches, progress=False)
        return metrics, torch.cat(seen), list(reads)

    caches = EvalCaches(config.input, CPU)
    (plain, pixels, _), first, second = run(None), run(caches), run(caches)
    assert first[0] == second[0] == plain
    assert torch.equal(first[1], pixels) and torch.equal(second[1], pixels)
    assert len(set(first[2])) == 40
    assert set(second[2]) == {str(tmp_path / "query/class03/2.jpg")}


def test_a_rank_keeps_its_own_part(tmp_path):
    write_images(tmp_path / "train", 2, 2)
    write_images(tmp_path / "test", 5, 4, seed=1)
    split = load_dataset("folder", str(tmp_path)).query
    parts = [Ranks(rank, 3, rank, 3) for rank in range(3)]
    loaders = [EvalLoader(split, batch_size=3, input=CONFIG.input, device=CPU, ranks=ranks) for ranks in parts]
    assert [row for loader in loaders for row in loader.own_rows] == list(range(20))
    for loader in loaders:
        cache = EvalCaches(CONFIG.input, CPU).of({"test": len(loader.own_rows)})["test"]
        assert cache.pixels.numel() == len(loader.own_rows) * 16 * 16 * 3
        expected = [(b.indices.tolist(), b.images.clone()) for b in loader]
        loader.keep_in(cache)
        for _ in range(2):
            found = [(b.indices.tolist(), b.images.clone()) for b in loader]
            assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))
        assert cache.valid.all()
        loader.close()


def test_crops_are_kept_in_their_share_of_the_memory_beside_training(monkeypatch):
    needed = 100 * 16 * 16 * 3
    gpu = torch.device("cuda:0")
    made, room = [], {}
    monkeypatch.setattr(cache_budget, "ImageCache", lambda shapes, device, place: made.append(place) or place)
    monkeypatch.setattr(cache_budget, "free_memory", lambda place, device: int(room[place] * needed))

    def place(cache, on, **free):
        room.update(free)
        found = EvalCaches(CONFIG.replace(cache=cache).input, on).of({"query": 40, "gallery": 60})
        assert len(set(found.values())) <= 1
        return next(iter(found.values()), None)

    assert place("auto", gpu, device=5.1, host=9) == "device"
    assert place("auto", gpu, device=4.9, host=4.1) == "host"
    assert place("auto", gpu, device=4.9, host=3.9) is None
    assert place("device", gpu, device=4.9, host=9) is None
    assert place("device", CPU, host=4.1) == place("host", CPU, host=4.1) == "host"
    assert place("none", CPU, host=9) is place("none", gpu, device=9) is None
    training = ImageCache(np.full((100, 2), 16), CPU, "host")
    room["host"] = 4.5
    for filled in (False, True):  # the first time training has yet to fill its own
        training.valid[:] = filled
        caches = EvalCaches(CONFIG.input, CPU)
        caches.training = training
        assert bool(caches.of({"test": 100})) == filled
