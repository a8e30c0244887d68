"""`fastirt demo`: draw the demo set in parallel, whole or not at all."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Iterator

from tqdm import tqdm

from fastirt.config.random_streams import stream
from fastirt.demo.product import JPEG, make_product
from fastirt.demo.scene import is_large, take_photo
from fastirt.errors import UserError

log = logging.getLogger("fastirt")

FORMAT = 2  # of the drawings: raise it when they change
LARGEST = 4096  # pixels a side


def generate(
    out: Path,
    *,
    classes: int = 225,
    views: int = 12,
    width: int = 64,
    height: int = 64,
    seed: int = 0,
    quality: tuple[int, int] = (70, 95),
    train_classes: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Draw `classes` products x `views` images into out/train/CLASS/VIEW.jpg and out/test/CLASS/VIEW.jpg.

    The first `train_classes` (two thirds, unless given) train, the others are the test split. `quality` is the JPEG quality, from
    and to, inclusive. The same arguments give the same bytes for any number of `workers` (processes, one a core unless given).
    out/demo.json holds the arguments; a folder that holds the same ones is left as it is. Raises UserError for impossible
    arguments and for a folder with anything else in it.
    """
    out = Path(out)
    train_classes = classes * 2 // 3 if train_classes is None else train_classes
    made_from = {
        "format": FORMAT,
        "classes": classes,
        "views": views,
        "width": width,
        "height": height,
        "seed": seed,
        "quality": list(quality),
        "train_classes": train_classes,
    }
    _check(made_from, workers)
    if _already_there(out, made_from):
        log.info("%s: there already", out)
        return out
    place = out.resolve()
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tasks = [
            (partial / ("train" if number < train_classes else "test") / f"product{number:05d}", number, made_from)
            for number in range(classes)
        ]
        with tqdm(total=classes * views, unit="img", desc="demo", disable=None if progress else True) as bar:
            for _ in _run(tasks, workers or len(os.sched_getaffinity(0))):
                bar.update(views)
        (partial / "demo.json").write_text(json.dumps(made_from) + "\n")
        if place.exists():
            place.rmdir()  # empty, or `_already_there` had refused it
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    except BrokenProcessPool as error:
        raise UserError(
            f"{out}: a drawing process was killed, perhaps for want of memory: try again with --workers 1"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check(p: dict[str, Any], workers: int | None) -> None:
    if not 0 < p["train_classes"] < p["classes"] or p["views"] < 2:
        raise UserError(
            f"--classes {p['classes']} --views {p['views']}: at least 2 classes and 2 views are needed, and train classes "
            "between 1 and classes - 1"
        )
    if not (8 <= p["width"] <= LARGEST and 8 <= p["height"] <= LARGEST):
        raise UserError(f"--width {p['width']} --height {p['height']}: must be between 8 and {LARGEST}")
    if p["seed"] < 0:
        raise UserError(f"--seed {p['seed']}: must not be negative")
    low, high = p["quality"]
    if not 1 <= low <= high <= 100:
        raise UserError(f"quality {low} to {high}: must be between 1 and 100, the lower first")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")


def _run(tasks: list[tuple[Path, int, dict[str, Any]]], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(_draw_class, tasks)
        return
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        yield from pool.map(_draw_class, tasks, chunksize=max(1, min(8, len(tasks) // (4 * workers))))


def _end_with_parent() -> None:
    """A worker of a parent that was killed would wait for ever, or draw into the folder of the next attempt."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _draw_class(task: tuple[Path, int, dict[str, Any]]) -> None:
    folder, number, p = task
    folder.mkdir(parents=True)
    product = make_product(p["seed"], number)
    low, high = p["quality"]
    subsampling = 2 if is_large(p["width"], p["height"]) else 0  # 4:2:0 or 4:4:4
    for view in range(p["views"]):
        quality = int(stream(p["seed"], JPEG, number, view).integers(low, high + 1))
        photo = take_photo(product, p["seed"], number, view, p["width"], p["height"])
        photo.save(folder / f"{view:04d}.jpg", quality=quality, subsampling=subsampling)


def _already_there(out: Path, made_from: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        there = json.loads((out / "demo.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{out}: exists and is no demo set: choose another folder") from None
    if there != made_from:
        there = there if isinstance(there, dict) else {}
        different = ", ".join(f"{k} {there.get(k)}" for k in made_from if there.get(k) != made_from[k])
        raise UserError(f"{out}: holds another demo set ({different}): delete it or choose another folder")
    return True
