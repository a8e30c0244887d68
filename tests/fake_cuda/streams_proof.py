"""Order of streams: `python -m tests.fake_cuda.run streams_proof FOLDER [CASE ...]`.

FOLDER is a `folder` data set. The loader and the consumer of its batches take turns, as two threads
whose work on the device overlaps: the loader is always two batches ahead. Each planted case leaves
out one wait, which must be noticed.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import inspect
import json
import textwrap
from typing import Any, Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.fake_cuda import streams
from benchmarks.fake_cuda.fake_tensors import fake_module
from fastirt.config.options import Config
from fastirt.datasets import load_dataset
from fastirt.images import normalize
from fastirt.loading import prefetch
from fastirt.loading.batch import Batch
from fastirt.loading.cached_images import CachedImages
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.train_loader import TrainLoader, train_loader
from fastirt.model.build import build_encoder
from fastirt.retrieval import embed
from tests.fake_cuda.settings import LEFT_OUT
from tests.fake_cuda.step_proof import BATCH, CUDA, LAUNCHES, SIZE, fake_step
from tests.fake_cuda.stream_order import Order

INPUT = dict(loader="pil", input_size=SIZE, resize_size=SIZE + 4, num_workers=1)
STEPS = 7  # three of warm-up, a capture and four replays


def in_turns(items: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Instead of `Prefetch`: at each turn the loader queues its work, up to `depth` batches ahead.

    Both work in the calling thread, since FakeTensorMode belongs to a thread, each with its own
    current stream.
    """
    loader, ready = [streams.Stream(number=0)], collections.deque()
    while True:
        with streams.as_thread(loader):
            while len(ready) <= depth and (batch := next(items, None)) is not None:
                ready.append(batch)
        del batch  # else its memory is not free when the consumer has done with it
        if not ready:
            return
        yield ready.popleft()


def training(place: str, order: Order, folder: str) -> None:
    """Captured steps on a loader with `--cache place`."""
    loader = _loader(place, folder)
    with _watched_cache(loader, order):
        step = fake_step(engine="graph", precision="bf16", clip_grad=1.0, encoder_momentum=0.9, drop_path=0.1)
        for batch in loader:
            order.rows = batch.indices
            step(batch)


def reading(_: str, order: Order, folder: str) -> None:
    """A consumer that reads each tensor of each batch where the loader has put it."""
    out = torch.empty(BATCH, SIZE, SIZE, 3, dtype=torch.uint8, device=CUDA)
    table = torch.empty(256, 3, dtype=torch.uint8, device=CUDA)
    for batch in _loader("none", folder):
        normalize.whole_views.cache_clear()  # as batches of many sizes do
        batch.views.fill(out, table)
        batch.labels.clone()


def evaluation(_: str, order: Order, folder: str) -> None:
    """`embed` of a test split."""
    config = Config().replace(model="vit_tiny_patch16_224", model_kwargs=("depth=2",), weights="scratch", **INPUT)
    with _disable_current_modes():
        split = load_dataset("folder", folder).query
        encoder = build_encoder(config.model, SIZE)
    encoder = fake_module(encoder).to(CUDA)
    loader = EvalLoader(split, batch_size=5, input=config.input, device=CUDA)
    with mock.patch.object(embed, "_check", lambda *_: None):
        embed.embed(
            encoder, loader, split.paths, mean=encoder.mean, std=encoder.std, device=CUDA, dtype=torch.bfloat16,
            progress=False,
        )  # fmt: skip


def _loader(place: str, folder: str) -> TrainLoader:
    with _disable_current_modes():
        catalog = load_dataset("folder", folder)
    config = Config().replace(max_iter=STEPS, cache=place, batch_size=BATCH, m=0, **INPUT)
    return train_loader(catalog, config, CUDA)


def _watched_cache(loader: TrainLoader, order: Order) -> Any:
    """The images of a cache are accessed one by one; once `valid`, the host counts on them."""
    if not isinstance(loader.images, CachedImages):
        return contextlib.nullcontext()
    cache, views, advance, counted = loader.images.cache, CachedImages.views, CachedImages._advance, set()
    order.add_cache(cache.pixels, cache._starts)

    def views_of(self: CachedImages, rows: np.ndarray, *args: Any) -> Any:
        order.rows = rows
        return views(self, rows, *args)

    def counts(self: CachedImages) -> None:
        new = set(np.flatnonzero(cache.valid).tolist()) - counted
        counted.update(new)
        order.host_reads("the cache holds the image", cache.pixels, new)
        advance(self)

    return mock.patch.multiple(CachedImages, views=views_of, _advance=counts)


def without(name: str, code: str, instead: str) -> Any:
    """Plants a function of the project, `module:name`, with another piece of code in it."""
    module, _, path = name.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(code) != 1:
        raise ValueError(f"{name} has {source.count(code)} times: {code}")
    source = "\n" * (function.__code__.co_firstlineno - 1) + source.replace(code, instead)  # keeps the lines' numbers
    changed: dict[str, Any] = {}
    exec(compile(source, inspect.getsourcefile(function), "exec"), function.__globals__, changed)
    return mock.patch.object(owner, name, changed[name])


Scenario = Callable[[str, Order, str], None]
CASES: dict[str, tuple[Scenario, str]] = {
    "device cache": (training, "device"),
    "host cache": (training, "host"),
    "no cache": (training, "none"),
    "each tensor read": (reading, ""),
    "evaluation": (evaluation, ""),
}


def prove(case: str, folder: str) -> list[str]:
    """The races of a case; empty: none."""
    scenario, place = CASES[case]
    normalize.byte_table.cache_clear(), normalize.whole_views.cache_clear()
    LAUNCHES.clear()
    with FakeTensorMode(), mock.patch.object(prefetch, "Prefetch", in_turns), Order(LAUNCHES) as order:
        scenario(place, order, folder)
    return list(dict.fromkeys(order.races))


def main(arguments: list[str]) -> None:
    folder, *names = arguments
    for name in names or (*CASES, *LEFT_OUT):
        if name in CASES:
            races = prove(name, folder)
        else:
            case, *change, _ = LEFT_OUT[name]
            with without(*change):
                races = prove(case, folder)
        print(json.dumps([name, races]), flush=True)
