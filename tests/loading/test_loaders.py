"""Batches are the same for any threads, decoder and start, and padded in evaluation."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from fastirt.datasets import load_dataset
from fastirt.errors import UserError
from fastirt.images.pack import PackedStore, pack
from fastirt.images.resize_crop import check_input
from fastirt.images.source import FileSource
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.prefetch import Prefetch
from tests.helpers import CPU, FAST_LOADERS, needs_dali, run_python, tiny_input, tiny_loader


def loaded(image_folder, start=0, stop=5, **changes):
    catalog = load_dataset("folder", str(image_folder))
    split = catalog.train
    loader = tiny_loader(catalog, start_step=start, batch_size=32, m=4, seed=7, max_iter=stop, **changes)
    batches = [(b.step, b.indices.tolist(), b.labels.tolist(), b.images.clone()) for b in loader]
    loader.close()
    assert all(np.array_equal(labels, split.labels[rows]) for _, rows, labels, _ in batches)
    return batches


def same(a, b):
    return len(a) == len(b) and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b))


@pytest.mark.parametrize("loader", FAST_LOADERS)
def test_batches_do_not_depend_on_threads_or_on_where_the_run_began(image_folder, loader):
    whole = loaded(image_folder, loader=loader)
    assert [step for step, *_ in whole] == [0, 1, 2, 3, 4]
    assert whole[0][3].shape == (32, 16, 16, 3)
    assert whole[0][3].dtype == torch.uint8
    assert same(whole, loaded(image_folder, num_workers=1, loader=loader))
    assert same(whole[3:], loaded(image_folder, start=3, loader=loader))


@pytest.mark.parametrize("loader, most", [pytest.param("dali", 0.5, marks=needs_dali), ("torchvision", 0.01)])
def test_pillow_s_decoder_gives_the_same_batches(image_folder, loader, most):
    for ours, plain in zip(loaded(image_folder, loader=loader), loaded(image_folder, loader="pil"), strict=True):
        assert ours[:3] == plain[:3]
        assert (ours[3].int() - plain[3].int()).abs().float().mean() < most


def test_images_survive_later_batches(image_folder):
    catalog = load_dataset("folder", str(image_folder))
    loader = tiny_loader(catalog, batch_size=32, max_iter=6)
    kept = [(batch.images, batch.images.clone()) for batch in loader]
    assert all(torch.equal(now, then) for now, then in kept)


class CountingSource(FileSource):
    """Counts how often each row is read."""

    def __init__(self, paths):
        super().__init__(paths)
        self.reads = Counter()

    def read(self, row):
        self.reads[row] += 1
        return super().read(row)


@needs_dali
def test_the_next_batch_is_read_while_one_is_decoded(image_folder):
    """Before a batch is decoded the threads are given the next one, and no image is read twice in
    an epoch.
    """
    catalog = load_dataset("folder", str(image_folder))
    source = CountingSource(catalog.train.paths)
    loader = tiny_loader(catalog, store=source, batch_size=16, max_iter=4, loader="dali")
    images, decoded = loader.images, []
    decode = images.decoder.decode

    def slow(encoded, crops):
        following = loader.sampler.batch(len(decoded) + 1).tolist()
        end = time.monotonic() + 20
        while not source.reads.keys() >= set(following) and time.monotonic() < end:
            time.sleep(0.001)
        assert source.reads.keys() >= set(following)
        decoded.append(decode(encoded, crops))
        return decoded[-1]

    images.decoder.decode = slow
    batches = list(loader)
    assert len(batches) == 4
    assert list(source.reads.values()) == [1] * 80
    for batch, pixels in zip(batches, decoded):
        # a view of what was decoded, not a copy
        assert batch.images.data_ptr() == pixels.data_ptr()


@pytest.mark.parametrize("training", [True, False])
def test_threads_begin_the_next_batch_before_one_is_finished(image_folder, training):
    """Each batch is decoded once, also in evaluation, and the last one has none behind it there."""
    catalog = load_dataset("folder", str(image_folder))
    options = dict(loader="torchvision", num_workers=2)
    if training:
        loader = tiny_loader(catalog, batch_size=16, max_iter=4, **options)
    else:
        loader = EvalLoader(catalog.query, batch_size=8, input=tiny_input(**options), device=CPU)
    decoder, events = loader.images.decoder, []
    start = decoder.start

    def recorded(encoded, crops):
        number, wait = sum(name == "begun" for name, _ in events), start(encoded, crops)
        events.append(("begun", number))
        return lambda: events.append(("finished", number)) or wait()

    decoder.start = recorded
    count = len(list(loader))
    begun, finished = ([number for name, number in events if name == kind] for kind in ("begun", "finished"))
    assert finished == list(range(count)) and begun == list(range(count + training))
    for number in range(count - 1):
        assert events.index(("begun", number + 1)) < events.index(("finished", number))


def test_evaluation_is_in_order_with_a_padded_last_batch(image_folder):
    catalog = load_dataset("folder", str(image_folder))
    config = tiny_input()
    batches = list(EvalLoader(catalog.query, batch_size=5, input=config, device=CPU))
    assert [b.valid for b in batches] == [5, 5, 5, 5, 4]
    assert all(b.images.shape == (5, 16, 16, 3) for b in batches)
    assert np.concatenate([b.indices[: b.valid] for b in batches]).tolist() == list(range(24))
    assert (batches[-1].labels[4:] == -1).all()


@pytest.mark.parametrize("batch_size", [1, 5, 7, 10, 23, 24, 25, 128])
def test_evaluation_takes_the_smallest_batches_of_their_number(image_folder, batch_size):
    """24 images: no more batches than with full ones, and less than one image of padding a
    batch."""
    catalog = load_dataset("folder", str(image_folder))
    config = tiny_input()
    loader = EvalLoader(catalog.query, batch_size=batch_size, input=config, device=CPU)
    batches = list(loader)
    assert len(loader) == len(batches) == -(-24 // batch_size)
    assert len({len(b) for b in batches}) == 1
    assert len(batches[0]) <= batch_size
    assert sum(len(b) - b.valid for b in batches) < len(batches)
    assert np.concatenate([b.indices[: b.valid] for b in batches]).tolist() == list(range(24))


def test_a_batch_size_of_zero_is_one_clear_line(image_folder):
    config = tiny_input()
    with pytest.raises(UserError, match="--eval-batch-size 0"):
        EvalLoader(load_dataset("folder", str(image_folder)).query, batch_size=0, input=config, device=CPU)


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_a_packed_store_gives_the_batches_of_the_files(image_folder, tmp_path, resize):
    catalog = load_dataset("folder", str(image_folder))
    pack(catalog, tmp_path / "store", resize=resize, resize_size=18, quality=100, workers=1, progress=False)
    store = PackedStore.open(tmp_path / "store")
    options = dict(batch_size=16, m=2, max_iter=2, resize=resize)
    loaders = [tiny_loader(catalog, store=source, **options) for source in (None, store.split(catalog.train))]
    for files, packed in zip(*loaders):
        assert np.array_equal(files.indices, packed.indices)
        assert (files.images.int() - packed.images.int()).abs().float().mean() < 1.5


def test_leaving_the_loop_stops_the_threads(image_folder):
    catalog = load_dataset("folder", str(image_folder))
    before = threading.active_count()
    loader = tiny_loader(catalog, batch_size=8)
    for batch in loader:
        if batch.step == 2:
            break
    loader.close()
    assert threading.active_count() <= before + 1
    with pytest.raises(UserError, match="--resize-size 10"):
        check_input(tiny_input(resize_size=10))


def test_on_a_cpu_no_thread_decodes_beside_the_step(image_folder):
    loader = tiny_loader(load_dataset("folder", str(image_folder)), batch_size=8, cache="host")
    decode, threads = loader.images.decoder.decode_whole, set()
    loader.images.decoder.decode_whole = lambda *given: threads.add(threading.current_thread()) or decode(*given)
    for _ in zip(range(3), loader):
        pass
    loader.close()
    assert threads == {threading.current_thread()}


def test_the_thread_beside_a_gpu_raises_its_error_after_the_items_and_ends():
    def items():
        yield from range(5)
        raise KeyError("late")

    before, found = threading.active_count(), []
    with pytest.raises(KeyError, match="late"):
        for item in Prefetch(items(), 2):
            found.append(item)
    assert found == list(range(5))
    left = Prefetch(iter(range(100)), 2)
    assert next(left) == 0
    del left
    assert threading.active_count() == before


ABANDONED = """
import sys, torch
from fastirt.config.options import Config
from fastirt.datasets import load_dataset
from fastirt.loading.prefetch import Prefetch
from fastirt.loading.train_loader import train_loader
config = Config().replace(batch_size=8, input_size=16, resize_size=18, num_workers=2, cache="none")
loader = train_loader(load_dataset("folder", sys.argv[1]), config, torch.device("cpu"))
loader.images.open()
for batch in Prefetch(loader.batches(), 2):  # as beside a GPU
    raise KeyError("the consumer's own")
"""


@pytest.mark.slow
def test_a_process_that_dies_with_a_loader_open_ends_cleanly(image_folder):
    done = run_python(ABANDONED, image_folder, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("the consumer's own\"")
    assert "ignored" not in done.stderr
