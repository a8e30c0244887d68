"""From image files to vectors on disk: `fastirt embed` beside timm's inference and a plain loop."""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader, create_transform, resolve_model_data_config

from benchmarks.contenders import public_recipe
from benchmarks.parts.input import rendered
from benchmarks.results import Results, figure_of
from benchmarks.timing import reason
from fastirt.datasets.records import Split
from fastirt.inference.embed_files import embed_files
from fastirt.inference.image_list import ImageList
from fastirt.inference.load import load
from fastirt.inference.model import Model
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.encoder import normalization_constants
from fastirt.model.precision import autocast, resolve_precision
from fastirt.retrieval.embed import embed

LIMIT = "encoder alone"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-path", type=Path, help="folder of images (default: rendered, 500 x 375)")
    parser.add_argument("--images", type=int, help="the first images of the folder (default: 480)")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="(default: %(default)s)")
    parser.add_argument("--model-kwargs", nargs="*", default=[], help="as for `fastirt train`")
    parser.add_argument("--weights", help="file of weights (default: random ones)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=public_recipe.cores(), help="threads or processes (default: %(default)s)"
    )


def run(args: argparse.Namespace, results: Results) -> None:
    count, rounds = args.images or (32 if args.quick else 480), args.repeats or (2 if args.quick else 5)
    batch_size = min(args.batch_size, 8) if args.quick else args.batch_size
    options: dict[str, Any] = {"num_workers": args.workers, "model_kwargs": tuple(args.model_kwargs)}
    engines = ("eager", "onednn") if results.device.type == "cpu" else ("eager",)
    model, *others = (
        load(
            args.model,
            pretrained=False,
            weights=args.weights,
            device=str(results.device),
            engine=engine,
            options=options,
        )
        for engine in engines
    )
    with tempfile.TemporaryDirectory() as folder:
        place = args.data_path or rendered(Path(folder), count)
        every = ImageList.at(str(place))
        images = ImageList.from_files([str(file) for file in every.files[:count]], str(place))
        few = ImageList.from_files([str(file) for file in every.files[:batch_size]], str(place))
        warm_up, calls = (contenders(model, others, of, Path(folder), batch_size, args.workers) for of in (few, images))
        params = dict(model=args.model, batch_size=batch_size, workers=args.workers, images=len(images))
        _measure(warm_up, calls, len(images), rounds, params, results)


def contenders(
    model: Model, others: Sequence[Model], images: ImageList, folder: Path, batch_size: int, workers: int
) -> dict[str, Callable[[], Any]]:
    """By name, a function that embeds all images once.

    All use one model's weights in its precision; the peers preprocess by timm's transform.
    others: the same model with other engines.
    """
    files = [str(file) for file in images.files]
    forward = partial(_forward, model)
    transform = create_transform(**resolve_model_data_config(model.encoder.vit), is_training=False)
    prepared = torch.stack([transform(_opened(file)) for file in files[:batch_size]])
    sizes = [min(batch_size, len(files) - first) for first in range(0, len(files), batch_size)]

    def ours(of: Model) -> np.ndarray:
        out = folder / "vectors.npy"
        with contextlib.redirect_stdout(io.StringIO()):  # its own rate
            embed_files(of, lambda: images, out, batch_size=batch_size, overwrite=True)
        return np.load(out)

    def evaluation() -> np.ndarray:
        split = Split("all", tuple(files), np.zeros(len(files), np.int64))
        loader = EvalLoader(split, batch_size=batch_size, input=model.config.input, device=model.device)
        mean, std = normalization_constants(model.config, model.encoder)
        dtype = resolve_precision(model.config.model.precision, model.device)
        return embed(
            model.encoder, loader, files, mean=mean, std=std, device=model.device, dtype=dtype, progress=False
        ).vectors.numpy()  # fmt: skip

    def timm_inference() -> np.ndarray:
        config, images_of_timm = resolve_model_data_config(model.encoder.vit), cast(Any, _Files(files))
        loader = create_loader(
            images_of_timm, config["input_size"], batch_size, is_training=False, use_prefetcher=False,
            interpolation=config["interpolation"], mean=config["mean"], std=config["std"], num_workers=workers,
            crop_pct=config["crop_pct"], device=model.device, pin_memory=model.device.type == "cuda",
        )  # fmt: skip
        return np.concatenate([forward(batch) for batch, _ in loader])

    def plain_loop() -> np.ndarray:
        parts: Iterator[list[str]] = (files[first : first + batch_size] for first in range(0, len(files), batch_size))
        return np.concatenate([forward(torch.stack([transform(_opened(file)) for file in part])) for part in parts])

    return {
        LIMIT: lambda: np.concatenate([forward(prepared[:size]) for size in sizes]),
        "fastirt embed": lambda: ours(model),
        **{f"fastirt embed, {other.engine}": partial(ours, other) for other in others},
        "fastirt evaluation": evaluation,
        "timm inference": timm_inference,
        "open_clip-style loop": plain_loop,
    }


class _Files(torch.utils.data.Dataset):
    """As timm's ImageDataset: `create_loader` sets the transform."""

    transform: Any = None

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.transform(_opened(self.files[row])), 0


def _opened(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _forward(model: Model, batch: torch.Tensor) -> np.ndarray:
    """Unit vectors of a normalized batch, in the way of plain timm."""
    dtype = resolve_precision(model.config.model.precision, model.device)
    with torch.inference_mode(), autocast(dtype, model.device):
        vit: Any = model.encoder.vit
        tokens = vit.forward_features(batch.to(model.device, non_blocking=True))
        return F.normalize(vit.forward_head(tokens, pre_logits=True).float(), dim=1).cpu().numpy()


def _measure(
    warm_up: dict[str, Callable[[], Any]],
    calls: dict[str, Callable[[], Any]],
    count: int,
    rounds: int,
    params: dict[str, Any],
    results: Results,
) -> None:
    """A pass of each in turn, the start of worker processes included; `warm_up` is not timed."""
    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, call in (calls if number else warm_up).items():
            if name not in calls:
                continue  # it failed
            try:
                start = time.perf_counter()
                call()
                if number:
                    rates.setdefault(name, []).append(count / (time.perf_counter() - start))
            except Exception as error:  # the library is missing, or does not work on this machine
                results.not_run("embed", name, reason(error))
                calls = {other: call for other, call in calls.items() if other != name}
    medians = {name: statistics.median(rates[name]) for name in calls}
    for name in calls:
        limit = None if name == LIMIT else medians.get(LIMIT)
        over = {"embed_over_this": medians["fastirt embed"] / medians[name]} if "fastirt embed" in medians else {}
        results.add(
            figure_of(
                rates[name], part="embed", name=name, unit="imgs/s", params=params,
                limit=limit, limit_name=LIMIT if limit else "", extra=over,
            )
        )  # fmt: skip
