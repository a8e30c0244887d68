"""Whole runs from image files to updated weights: `fastirt train` with and without a cache, and the
public recipe's loop."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import public_recipe
from benchmarks.parts.input import rendered
from benchmarks.parts.step import default_model, operations
from benchmarks.results import Results, figure_of
from benchmarks.timing import reason, release
from fastirt.cli import main as fastirt
from fastirt.config.options import Config
from fastirt.datasets import load_dataset
from fastirt.images.decoders.choose import choose_loader
from fastirt.model.build import build_encoder

# steps between readings of the rate; the first two thirds of the readings are warm-up
LOG_STEPS = 5


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-path", type=Path, help="class folders of images (default: rendered, 500 x 375)")
    parser.add_argument("--images", "--pictures", type=int, help="images to render (default: 960; on a CPU 120)")
    parser.add_argument("--model", help="timm name (default: deit_small_patch16_224; on a CPU vit_tiny_patch16_224)")
    parser.add_argument("--input-size", type=int, help="(default: 224; on a CPU 64)")
    parser.add_argument("--batch-size", type=int, help="(default: 64; on a CPU 8)")
    parser.add_argument("--steps", type=int, help="(default: 300; on a CPU 90, in a quick run 15)")


def run(args: argparse.Namespace, results: Results) -> None:
    on_gpu = results.device.type == "cuda"
    sizes = dict(
        loader=choose_loader("auto", results.device),
        model=args.model or default_model(results.device),
        batch_size=args.batch_size or (64 if on_gpu else 8),
        input_size=args.input_size or (224 if on_gpu else 64),
        steps=args.steps or (300 if on_gpu else 15 if args.quick else 90),
    )
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or rendered(Path(folder), args.images or (960 if on_gpu else 96 if args.quick else 120))
        flags_of_run = {"fastirt": [], "fastirt, no cache": ["--cache", "none"]}
        if on_gpu:  # on a CPU these are the defaults
            flags_of_run["fastirt, eager fp32"] = ["--engine", "eager", "--precision", "fp32"]
        else:  # the default of longer runs on some CPUs
            flags_of_run["fastirt, onednn"] = ["--engine", "onednn"]
        for name, flags in flags_of_run.items():
            try:
                rates, extra = _ours(Path(folder) / name.replace(" ", ""), root, sizes, flags, results.device)
                _add(results, name, sizes, rates, extra)
            except (Exception, SystemExit) as error:
                results.not_run("train", name, reason(error))
            release(results.device)
        try:
            _add(results, public_recipe.recipe_name(), sizes, *_public(root, sizes, results.device))
        except Exception as error:
            results.not_run("train", public_recipe.recipe_name(), reason(error))


def _add(results: Results, name: str, sizes: dict[str, Any], rates: list[float], extra: dict[str, Any]) -> None:
    """Add a figure beside the limit of the step alone: the machine's rate of products, with no time
    for the input."""
    precision = "bf16" if results.device.type == "cuda" else "fp32"
    flops = operations(sizes["model"], sizes["input_size"])
    results.add(
        figure_of(
            rates, part="train", name=name, unit="imgs/s", params=sizes, extra=extra,
            limit_name=f"{precision} products" if flops else "",
            limit=results.limits[precision] * 1e12 / flops if flops else None,
        )
    )  # fmt: skip


def _ours(
    folder: Path, root: Path, sizes: dict[str, Any], flags: list[str], device: torch.device
) -> tuple[list[float], dict[str, Any]]:
    """(imgs/s at each reading of the last third; medians of other columns of the log, and imgs/s of
    the first epoch).

    Evaluation is not timed.
    """
    argv = ["train", "--dataset", "folder", "--data-path", str(root), "--recipe", "paper", "--weights", "scratch"]
    for flag in ("model", "input_size", "batch_size", "loader"):
        argv += ["--" + flag.replace("_", "-"), str(sizes[flag])]
    argv += ["--max-iter", str(sizes["steps"]), "--logging-freq", str(LOG_STEPS), "--save-freq", "0", "--rank", "1"]
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = fastirt([*argv, "--output-dir", str(folder), "--device", str(device), *flags])
    finally:
        logging.disable(logging.NOTSET)
    if code:
        raise RuntimeError(f"fastirt train ended with exit code {code}")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "imgs_per_s" in row]
    first = _first_epoch([row["imgs_per_s"] for row in rows], root, sizes)
    rows = rows[2 * len(rows) // 3 :]
    logged = [name for name in ("mfu", "input_wait") if name in rows[0]]  # no MFU on a CPU
    extra = {name: statistics.median(row[name] for row in rows) for name in logged}
    return [row["imgs_per_s"] for row in rows], extra | first


def _first_epoch(rates: list[float], root: Path, sizes: dict[str, Any]) -> dict[str, float]:
    """imgs/s of the readings that end within the first epoch, in which every image is new."""
    readings = len(load_dataset("folder", str(root)).train) // (LOG_STEPS * sizes["batch_size"])
    return {"first_epoch": statistics.harmonic_mean(rates[:readings])} if readings else {}


def _public(root: Path, sizes: dict[str, Any], device: torch.device) -> tuple[list[float], dict[str, float]]:
    """As `_ours`, of a run of `steps` steps, at most 60."""
    torch.backends.cudnn.allow_tf32 = True  # torch's default; a run in fp32 has changed it
    split = load_dataset("folder", str(root)).train
    config = Config().replace(weights="scratch", model=sizes["model"])
    recipe = public_recipe.Recipe(build_encoder(config.model, sizes["input_size"]).vit, len(split), device)
    size = sizes["input_size"]
    workers, resize = public_recipe.cores(), round(size * 256 / 224)
    stream = iter(public_recipe.loader(split.paths, split.labels, sizes["batch_size"], workers, size, resize))
    rates, start = [], time.perf_counter()
    for step in range(1, min(sizes["steps"], 60) + 1):
        images, labels = next(stream)
        recipe(images.to(device), labels.to(device))
        if step % LOG_STEPS == 0:
            rates.append(LOG_STEPS * sizes["batch_size"] / (time.perf_counter() - start))
            start = time.perf_counter()
    return rates[2 * len(rates) // 3 :], _first_epoch(rates, root, sizes)
