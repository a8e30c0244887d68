"""From image files to training batches (decode, resize, crop, flip): fastirt beside the public
recipe and torchvision."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch

from benchmarks.contenders import public_recipe
from benchmarks.results import Results, figure_of
from benchmarks.timing import reason
from fastirt.config.options import Config
from fastirt.datasets import Catalog, load_dataset
from fastirt.demo.generate import generate
from fastirt.images.decoders.pil import decode
from fastirt.images.pack import PackedStore, pack
from fastirt.images.source import FileSource, ImageSource
from fastirt.loading.train_loader import train_loader

SIZE, RESIZE = 224, 256
PUBLIC = "public recipe"
LIMIT, LIMIT_PACKED = "decode alone", "decode alone, packed"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-path", type=Path, help="class folders of images (default: rendered, 500 x 375)")
    parser.add_argument("--images", "--pictures", type=int, help="images to render (default: 480)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, help="batches in a round (default: 4 x workers, at least 6)")
    parser.add_argument(
        "--workers",
        type=int,
        default=public_recipe.cores(),
        help="threads or processes of each contender (default: %(default)s)",
    )


def rendered(folder: Path, count: int) -> Path:
    """The folder of a new demo set: about `count` images of 500 x 375 pixels."""
    views = 12
    generate(folder / "images", classes=max(4, count // views), views=views, width=500, height=375)
    return folder / "images"


def torchvision_batches(paths: Sequence[str], batch_size: int, workers: int) -> Iterator[Any]:
    """Endless uint8 batches by torchvision: decode_jpeg and transforms v2 in a pool of threads, one
    batch ahead."""
    from torchvision import io
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(RESIZE, antialias=True), v2.RandomCrop(SIZE), v2.RandomHorizontalFlip()])

    def load(path: str) -> torch.Tensor:
        return transform(io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB))

    order = itertools.cycle(np.random.default_rng(0).permutation(len(paths)).tolist())
    with ThreadPoolExecutor(workers) as pool:
        batch = [pool.submit(load, paths[next(order)]) for _ in range(batch_size)]
        while True:
            next_batch = [pool.submit(load, paths[next(order)]) for _ in range(batch_size)]
            yield torch.stack([image.result() for image in batch])
            batch = next_batch


def contenders(
    catalog: Catalog, store: Path, batch_size: int, workers: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """By name, a function that starts the contender's endless stream of batches: an iterator with
    `close`."""
    split = catalog.train

    def ours(loader: str, source: Any = None) -> Callable[[], Iterator]:
        config = Config().replace(
            resize="shorter", input_size=SIZE, resize_size=RESIZE, num_workers=workers, loader=loader, cache="none",
            batch_size=batch_size, m=0, seed=0, max_iter=10**9,
        )  # fmt: skip
        return lambda: iter(train_loader(catalog, config, device, store=source))

    def peer() -> Iterator:
        return (batch for batch in public_recipe.loader(split.paths, split.labels, batch_size, workers, SIZE, RESIZE))

    # "auto" is torchvision on a CPU, DALI on a GPU
    return {
        PUBLIC: peer,
        "torchvision v2": lambda: torchvision_batches(split.paths, batch_size, workers),
        "fastirt files": ours("auto"),
        "fastirt packed": ours("auto", PackedStore.open(store).split(split)),
        "fastirt files, DALI": ours("dali"),
        "fastirt files, PIL": ours("pil"),
    }


def decode_rate(encoded: Sequence[np.ndarray], count: int, workers: int) -> float:
    """Images a second when `workers` threads only decode JPEGs, `count` of them.

    By torchvision where it is installed, else by PIL.
    """
    decode_one: Callable[[np.ndarray], Any] = decode
    with contextlib.suppress(ImportError):
        from torchvision import io

        decode_one = lambda data: io.decode_jpeg(torch.from_numpy(data), mode=io.ImageReadMode.RGB)

    def share(first: int) -> None:
        for row in range(first, count, workers):
            decode_one(encoded[row % len(encoded)])

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(share, range(workers)))
    return count / (time.perf_counter() - start)


def run(args: argparse.Namespace, results: Results) -> None:
    batch_size = min(args.batch_size, 8) if args.quick else args.batch_size
    batches, rounds = args.batches or max(6, 4 * args.workers), args.repeats or (2 if args.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or rendered(Path(folder), args.images or (64 if args.quick else 480))
        catalog = load_dataset("folder", str(root))
        store = Path(folder) / "store"
        pack(catalog, store, resize="shorter", resize_size=RESIZE, progress=False)
        _measure(catalog, store, batch_size, batches, rounds, args.workers, results)


def _measure(
    catalog: Catalog, store: Path, batch_size: int, batches: int, rounds: int, workers: int, results: Results
) -> None:
    """A round of each contender in turn: two that decode at once would share the cores.

    The first 2 x workers batches, which worker processes prefetch, are not timed.
    """
    streams = contenders(catalog, store, batch_size, workers, results.device)
    sources: dict[str, ImageSource] = {
        LIMIT: FileSource(catalog.train.paths),
        LIMIT_PACKED: PackedStore.open(store).split(catalog.train),
    }
    encoded = {name: [np.array(source.read(row)) for row in range(len(source))] for name, source in sources.items()}
    params = dict(batch_size=batch_size, workers=workers, crop=SIZE, pictures=len(catalog.train))
    medians: dict[str, float] = {}

    def add(name: str) -> None:
        medians[name] = statistics.median(rates[name])
        limit_name = LIMIT_PACKED if "packed" in name else LIMIT
        extra: dict[str, Any] = {"bytes_a_picture": round(float(np.mean([len(data) for data in encoded[limit_name]])))}
        if name not in encoded and PUBLIC in medians:
            extra["times_public"] = medians[name] / medians[PUBLIC]
        # DALI's GPU decoder
        on_cpu = results.device.type != "cuda" or not name.startswith("fastirt") or name == "fastirt files, PIL"
        limit = medians.get(limit_name) if on_cpu and name not in encoded else None
        results.add(
            figure_of(
                rates[name], part="input", name=name, unit="imgs/s", params=params, limit=limit,
                limit_name=limit_name if limit else "", extra=extra,
            )
        )  # fmt: skip

    rates: dict[str, list[float]] = {}
    names = [*encoded, *streams]
    # A GPU's lease may end: one contender after the other, each with its figure.
    in_turn = names * rounds if results.device.type != "cuda" else [name for name in names for _ in range(rounds)]
    for name in in_turn:
        if name in rates and not rates[name]:
            continue  # it failed in an earlier round
        try:
            if name in encoded:
                rate = decode_rate(encoded[name], batches * batch_size, workers)
            else:
                rate = batch_size * _batches_per_second(streams[name], 2 * workers, batches, results.device)
            rates.setdefault(name, []).append(rate)
            if len(rates[name]) == rounds:
                add(name)
        except Exception as error:  # the library is missing, or does not work on this machine
            rates[name] = []
            results.not_run("input", name, reason(error))


def _batches_per_second(start_stream: Callable[[], Any], warm_up: int, count: int, device: torch.device) -> float:
    stream = start_stream()
    try:
        for _ in range(warm_up):
            next(stream)
        start = time.perf_counter()
        for _ in range(count):
            next(stream)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return count / (time.perf_counter() - start)
    finally:
        stream.close()
