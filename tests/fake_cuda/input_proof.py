"""Loaders, evaluation and the decoder on a fake GPU: `python -m tests.fake_cuda.run input_proof`.

The first argument is the folder of a `folder` data set. A loader works in the calling thread, since
FakeTensorMode belongs to a thread; its CUDA stream is its own as ever.
"""

from __future__ import annotations

import json
import traceback
from typing import Callable, Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fastirt.config.options import Config
from fastirt.datasets import load_dataset
from fastirt.images import normalize
from fastirt.loading import prefetch
from fastirt.loading.batch import Batch
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.train_loader import train_loader
from fastirt.model.build import build_encoder
from fastirt.retrieval import embed
from tests.fake_cuda import events
from tests.fake_cuda.fake_tensors import fake_module, recorded_streams
from tests.fake_cuda.step_proof import BATCH, CUDA, LAUNCHES, SIZE, fake_step, run_steps
from tests.fake_cuda.streams import host_waits, lines_of
from tests.fake_cuda.watch import Watch


def cached_in(place: str, folder: str) -> list[str]:
    """Batches of the training loader with `--cache place`, then captured steps on them."""
    flat = dict(cache=place, loader="pil", input_size=SIZE, resize_size=SIZE + 4, batch_size=BATCH, m=0, num_workers=1)
    with _disable_current_modes():
        catalog = load_dataset("folder", folder)
    loader = train_loader(catalog, Config().replace(max_iter=6, **flat), CUDA)
    with Watch() as watch:
        batches = list(loader)
    own = loader.images.stream._stream.number
    faults = [fault for fault in watch.faults if "a copy that waits: cpu to cuda" not in fault]  # Pillow's images
    faults += _check_loader_waits(len(batches))
    for batch in batches:
        faults += _check_batch(batch, place)
    launched = [event for event in events if event[0] == "launch"]
    if launched != ([("launch", "gather_kernel", own)] * len(batches) if place == "host" else []):
        faults.append(f"while the loader works: {launched}")
    LAUNCHES.clear()
    step = fake_step(engine="graph", precision="bf16")
    faults += run_steps(step, batches.__getitem__)
    pixels = [launch.arguments["pixels_ptr"] for launch in LAUNCHES if launch.name == "gather_kernel"]
    if place == "device" and any(p.data_ptr() != batches[0].views.pixels.data_ptr() for p in pixels):
        faults.append("the step reads its images elsewhere than in the cache")
    return faults


def _check_loader_waits(batches: int) -> list[str]:
    """The loader waits for its own stream before it hands a batch over, and for nothing else."""
    waits = host_waits()
    meant = [wait for wait in waits if "for the stream" in wait and "loading/prefetch.py" in wait]
    return [] if len(meant) == len(waits) >= batches else [f"{len(waits)} waits for {batches} batches: {waits[:3]}"]


def _check_batch(batch: Batch, place: str) -> list[str]:
    views, faults = batch.views, []
    if views.owned == (place == "device"):
        faults.append(f"--cache {place}: views are {'owned' if views.owned else 'shared'}")
    for name in ("labels", "starts", "widths", "picks", "pixels"):
        tensor = batch.labels if name == "labels" else getattr(views, name)
        if tensor.device != CUDA or tensor.dtype != (torch.uint8 if name == "pixels" else torch.int64):
            faults.append(f"{name} is {tensor.dtype} on {tensor.device}")
        # The consumer's stream is the default one.
        if 0 not in recorded_streams(tensor) and tensor is not (None if views.owned else views.pixels):
            faults.append(f"{name}: the allocator does not know that the step's stream reads it")
    return faults


def evaluation(_: str, folder: str) -> list[str]:
    """`embed` of a test split in bf16: one copy to the host, at the end."""
    flat = dict(loader="pil", input_size=SIZE, resize_size=SIZE + 4, num_workers=1, weights="scratch")
    config = Config().replace(model="vit_tiny_patch16_224", model_kwargs=("depth=2",), **flat)
    with _disable_current_modes():
        split = load_dataset("folder", folder).query
        encoder = build_encoder(config.model, SIZE)
    encoder = fake_module(encoder).to(CUDA)
    loader = EvalLoader(split, batch_size=5, input=config.input, device=CUDA)
    with Watch() as watch, mock.patch.object(embed, "_check", lambda *_: None):
        found = embed.embed(
            encoder, loader, split.paths, mean=encoder.mean, std=encoder.std, device=CUDA, dtype=torch.bfloat16,
            progress=False,
        )  # fmt: skip
    faults = [f for f in watch.faults if "loading/" not in f and "images/normalize.py" not in f]
    if len(faults) != 1 or "cuda to cpu" not in faults[0] or "retrieval/embed.py" not in faults[0]:
        return [f"instead of one copy of all embeddings: {faults}"]
    faults = [wait for wait in host_waits() if "loading/prefetch.py" not in wait]
    if set(watch.products) != {"bfloat16"}:
        faults.append(f"products in {sorted(watch.products)}")
    vectors = found.vectors
    if tuple(vectors.shape) != (len(split.paths), 192) or vectors.dtype != torch.float32 or vectors.is_cuda:
        faults.append(f"embeddings are {tuple(vectors.shape)} {vectors.dtype} on {vectors.device}")
    launched = [launch.name for launch in LAUNCHES]
    if launched != ["gather_kernel"] * len(loader):
        faults.append(f"launches: {launched}")
    return faults


def _in_this_thread(items: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Instead of `Prefetch`: all batches are made before the consumer gets the first, so that the
    loader's stream is no longer current."""
    batches = list(items)
    return (batch for batch in batches)


CASES: dict[str, Callable[[str, str], list[str]]] = {
    "device": cached_in,
    "host": cached_in,
    "none": cached_in,
    "evaluation": evaluation,
}


def prove(name: str, folder: str) -> list[str]:
    normalize.byte_table.cache_clear(), normalize.whole_views.cache_clear()
    LAUNCHES.clear()
    events.clear()
    try:
        with FakeTensorMode(), mock.patch.object(prefetch, "Prefetch", _in_this_thread):
            return CASES[name](name, folder)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:300]} at {lines_of(traceback.extract_tb(error.__traceback__))}"]


def main(arguments: list[str]) -> None:
    folder, *names = arguments
    for name in names or CASES:
        print(json.dumps([name, prove(name, folder)]), flush=True)
