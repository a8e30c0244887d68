"""`fastirt demo`: draw the demo set in parallel, whole or not at all."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastirt.demo.product import make_product, stream
from fastirt.demo.scene import take_photo
from fastirt.errors import UserError

log = logging.getLogger("fastirt")

FORMAT = 1  # of the drawings: raise it when they change
QUALITY = (70, 95)  # JPEG, inclusive
LARGEST = 4096  # pixels a side


def generate(out: Path, *, classes: int = 225, views: int = 12, width: int = 64, height: int = 64, seed: int = 0,
             train_classes: int | None = None, workers: int | None = None, progress: bool = True) -> Path:
    """Draw `classes` products x `views` pictures into out/train/CLASS/VIEW.jpg and out/test/CLASS/VIEW.jpg.

    The first `train_classes` (two thirds, unless given) train, the others are the test split. The same arguments give the same bytes
    for any number of `workers` (processes, one a core unless given). out/demo.json holds the arguments; a folder that
    holds the same ones is left as it is. Raises UserError for impossible arguments and for a folder with anything else in it.
    """
    out = Path(out)
    train_classes = classes * 2 // 3 if train_classes is None else train_classes
    if not 0 < train_classes < classes or views < 2:
        raise UserError(f"--classes {classes} --views {views}: at least 2 classes and 2 views are needed, and train classes between 1 and classes - 1")
    if not (8 <= width <= LARGEST and 8 <= height <= LARGEST):
        raise UserError(f"--width {width} --height {height}: must be between 8 and {LARGEST}")
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    made_from = {"format": FORMAT, "classes": classes, "views": views, "width": width, "height": height, "seed": seed, "train_classes": train_classes}
    if _already_there(out, made_from):
        log.info("%s: there already", out)
        return out
    workers = workers or len(os.sched_getaffinity(0))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tasks = [(partial / ("train" if number < train_classes else "test") / f"product{number:05d}", number, made_from) for number in range(classes)]
        with tqdm(total=classes * views, unit="img", desc="demo", disable=None if progress else True) as bar:
            for _ in _run(tasks, workers):
                bar.update(views)
        (partial / "demo.json").write_text(json.dumps(made_from) + "\n")
        if out.exists():
            out.rmdir()  # empty, or `_already_there` had refused it
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _run(tasks: list[tuple[Path, int, dict[str, Any]]], workers: int) -> Any:
    if workers == 1:
        yield from map(_draw_class, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_class, tasks, chunksize=max(1, min(8, len(tasks) // (4 * workers))))


def _draw_class(task: tuple[Path, int, dict[str, Any]]) -> None:
    folder, number, p = task
    folder.mkdir(parents=True)
    product = make_product(p["seed"], number)
    for view in range(p["views"]):
        quality = int(stream(p["seed"], 5, number, view).integers(QUALITY[0], QUALITY[1] + 1))
        photo = take_photo(product, p["seed"], number, view, p["width"], p["height"])
        photo.save(folder / f"{view:04d}.jpg", quality=quality, subsampling=0)


def _already_there(out: Path, made_from: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        there = json.loads((out / "demo.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{out}: exists and is no demo set: choose another folder") from None
    if there != made_from:
        different = ", ".join(f"{k} {there.get(k)}" for k in made_from if there.get(k) != made_from[k])
        raise UserError(f"{out}: holds another demo set ({different}): delete it or choose another folder")
    return True
