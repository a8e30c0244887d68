"""Pictures to training batches (decode, resize, crop, flip): fastirt beside the public recipe and torchvision."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch

from benchmarks import public
from benchmarks.results import Results, figure_of
from fastirt.catalog import Catalog, load_catalog
from fastirt.config import InputConfig
from fastirt.demo.generate import generate
from fastirt.input.loader import TrainLoader
from fastirt.input.pack import PackedStore, pack

WARM_UP = 2  # batches
SIZE, RESIZE = 224, 256


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-path", type=Path, help="class folders of pictures (default: rendered, 500 x 375)")
    parser.add_argument("--pictures", type=int, help="how many to render (default: 480)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, help="in a round (default: 6)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads or processes each")


def has_dali() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def rendered(folder: Path, count: int) -> Path:
    """A demo set of about `count` pictures of 500 x 375."""
    views = 12
    generate(folder / "pictures", classes=max(4, count // views), views=views, width=500, height=375)
    return folder / "pictures"


def torchvision_batches(paths: list[str], batch_size: int, workers: int) -> Iterator[Any]:
    """uint8 batches by torchvision: decode_jpeg and transforms v2, in a pool of threads, one batch ahead."""
    from torchvision import io
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(RESIZE, antialias=True), v2.RandomCrop(SIZE), v2.RandomHorizontalFlip()])

    def one(path: str) -> torch.Tensor:
        return transform(io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB))

    order = itertools.cycle(np.random.default_rng(0).permutation(len(paths)).tolist())
    with ThreadPoolExecutor(workers) as pool:
        coming = [pool.submit(one, paths[next(order)]) for _ in range(batch_size)]
        while True:
            following = [pool.submit(one, paths[next(order)]) for _ in range(batch_size)]
            yield torch.stack([picture.result() for picture in coming])
            coming = following


def contenders(
    catalog: Catalog, store: Path, batch_size: int, workers: int, device: torch.device
) -> dict[str, Callable[[], Iterator]]:
    """What makes each endless stream of batches."""
    split = catalog.train

    def ours(loader: str, source: Any = None) -> Callable[[], Iterator]:
        config = InputConfig(resize="shorter", input_size=SIZE, resize_size=RESIZE, num_workers=workers, loader=loader)
        given = dict(batch_size=batch_size, m=0, seed=0, input=config, device=device, store=source)
        return lambda: iter(TrainLoader(split, **given))

    def endless() -> Iterator:
        loader = public.loader(split.paths, split.labels, batch_size, workers, SIZE, RESIZE)
        return (batch for _ in itertools.count() for batch in loader)

    return {
        "public recipe": endless,
        "torchvision v2": lambda: torchvision_batches(split.paths, batch_size, workers),
        "fastirt files": ours("dali"),
        "fastirt packed": ours("dali", PackedStore.open(store).split(split)),
        "fastirt files, PIL": ours("pil"),
    }


def run(args: argparse.Namespace, results: Results) -> None:
    batch_size = min(args.batch_size, 8) if args.quick else args.batch_size
    batches, rounds = args.batches or (2 if args.quick else 6), args.repeats or (2 if args.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or rendered(Path(folder), args.pictures or (64 if args.quick else 480))
        catalog = load_catalog("folder", str(root))
        store = Path(folder) / "store"
        pack(catalog, store, resize="shorter", resize_size=RESIZE, progress=False)
        _measure(catalog, store, batch_size, batches, rounds, args.workers, results)


def _measure(
    catalog: Catalog, store: Path, batch_size: int, batches: int, rounds: int, workers: int, results: Results
) -> None:
    """Each contender alone for a round, then the next: two that decode at once would share the cores."""
    rates: dict[str, list[float]] = {}
    for name, make in [*contenders(catalog, store, batch_size, workers, results.device).items()] * rounds:
        if name in rates and not rates[name]:
            continue  # it failed before
        try:
            stream = make()
            for _ in range(WARM_UP):
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            if results.device.type == "cuda":
                torch.cuda.synchronize(results.device)
            rates.setdefault(name, []).append(batches * batch_size / (time.perf_counter() - start))
            close = getattr(stream, "close", None)
            if close is not None:
                close()
        except Exception as error:  # a library that is missing, or cannot do this on this machine
            rates[name] = []
            results.missing("input", name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
    mean_bytes = float(np.mean([os.path.getsize(path) for path in catalog.train.paths]))
    params = dict(batch_size=batch_size, workers=workers, crop=SIZE, pictures=len(catalog.train))
    base = statistics.median(rates["public recipe"]) if rates.get("public recipe") else None
    for name, values in rates.items():
        if values:
            extra = {"bytes_a_picture": round(mean_bytes)}
            extra |= {"times_public": statistics.median(values) / base} if base else {}
            results.add(figure_of(values, part="input", name=name, unit="imgs/s", params=params, extra=extra))
