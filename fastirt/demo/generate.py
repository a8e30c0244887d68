"""`fastirt demo`: draw the demo set in parallel, completely or not at all."""

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

FORMAT = 2  # version of the drawings: increase it when they change
LARGEST = 4096  # pixels per side


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
    """Draw products to out/train/CLASS/VIEW.jpg and out/test/CLASS/VIEW.jpg, and out/demo.json.

    The files are the same for any number of workers. A folder that holds the same demo set is kept.

    Args:
        out: folder to write.
        classes: number of products.
        views: images per product.
        width: of the images in pixels.
        height: of the images in pixels.
        seed: of the drawings.
        quality: lowest and highest JPEG quality.
        train_classes: number of products to train on, the first ones; None: two thirds.
        workers: number of processes; None: one per usable core.
        progress: show a progress bar.

    Returns:
        `out`.

    Raises:
        UserError: arguments out of range, a folder with other content, or no permission to write.
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
        log.info("%s: exists already", out)
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
            place.rmdir()  # empty: `_already_there` rejects other folders
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    except BrokenProcessPool as error:
        raise UserError(f"{out}: a drawing process was killed (out of memory?): try again with --workers 1") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check(options: dict[str, Any], workers: int | None) -> None:
    if not 0 < options["train_classes"] < options["classes"] or options["views"] < 2:
        raise UserError(
            f"--classes {options['classes']} --views {options['views']}: needs at least 2 classes, 2 views, and 1 to "
            "classes - 1 training classes"
        )
    if not (8 <= options["width"] <= LARGEST and 8 <= options["height"] <= LARGEST):
        raise UserError(f"--width {options['width']} --height {options['height']}: must be between 8 and {LARGEST}")
    if options["seed"] < 0:
        raise UserError(f"--seed {options['seed']}: must not be negative")
    low, high = options["quality"]
    if not 1 <= low <= high <= 100:
        raise UserError(f"quality {low} to {high}: must be between 1 and 100, in ascending order")
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
    """End this worker with its parent; it would wait forever or write to the next run's folder."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _draw_class(task: tuple[Path, int, dict[str, Any]]) -> None:
    folder, number, options = task
    folder.mkdir(parents=True)
    product = make_product(options["seed"], number)
    low, high = options["quality"]
    subsampling = 2 if is_large(options["width"], options["height"]) else 0  # 4:2:0 or 4:4:4
    for view in range(options["views"]):
        quality = int(stream(options["seed"], JPEG, number, view).integers(low, high + 1))
        photo = take_photo(product, options["seed"], number, view, options["width"], options["height"])
        photo.save(folder / f"{view:04d}.jpg", quality=quality, subsampling=subsampling)


def _already_there(out: Path, made_from: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        stored = json.loads((out / "demo.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{out}: exists and is no demo set: choose another folder") from None
    if stored != made_from:
        stored = stored if isinstance(stored, dict) else {}
        different = ", ".join(f"{k} {stored.get(k)}" for k in made_from if stored.get(k) != made_from[k])
        raise UserError(f"{out}: holds another demo set ({different}): delete it or choose another folder")
    return True
