"""The run's folder: found or made, described by config.json, and gone again where a start fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any, Iterator, Optional

import torch

from fastirt import __version__
from fastirt.atomic import atomic_write
from fastirt.config.options import Config
from fastirt.datasets import Catalog
from fastirt.datasets.digest import catalog_digest, evaluation_digest, sizes_digest
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.training import checkpoint

# What a run that did not get as far as its first log row leaves: nothing that anybody could want.
BARREN = {".lock", "config.json", "log.jsonl", "tensorboard"}


@contextlib.contextmanager
def run_folder(config: Config, fresh: bool, ranks: Ranks) -> Iterator[Path]:
    """The run's folder, absolute, while the run lasts. A folder that was made here is removed again by an error that
    comes before the first log row. `fresh`: a folder that holds a run is refused. Raises UserError.
    """
    made: list[Path] = []
    folder = Path(ranks.host.run_on_main(lambda: str(_open(config, fresh, made))))
    try:
        yield folder
    except BaseException:
        if made and _is_barren(folder):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in reversed(made[:-1]):
                with contextlib.suppress(OSError):  # another run lives there by now
                    parent.rmdir()
        raise


def write_config(folder: Path, config: Config, catalog: Catalog, digest: str) -> None:
    """config.json: versions, torchrun's job, every option, and the digests of the images (`digest`: of all)."""
    tree = {
        "fastirt": __version__,
        "torch": torch.__version__,
        "job": os.environ.get("TORCHELASTIC_RUN_ID"),
        "images": {"all": digest, "evaluated": evaluation_digest(catalog), "sizes": sizes_digest(catalog)},
        "config": config.to_dict(),
    }
    try:
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / 'config.json'}: cannot be written ({error.strerror})") from error


def read_tree(folder: Path) -> dict[str, Any]:
    """What `write_config` wrote; empty where there is nothing readable."""
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def read_config(folder: Path, saved: Optional[Path] = None) -> Config:
    """The configuration of an earlier run, or of its checkpoint `saved`. Raises UserError."""
    path = saved or folder / "config.json"
    try:
        tree = checkpoint.load(saved)["config"] if saved else json.loads(path.read_text(encoding="utf-8"))["config"]
        return Config.from_dict(tree)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so {folder} is not a run's folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read, or was made by another version of fastirt ({error})") from error


def holds_images_of(folder: Path, catalog: Catalog) -> bool:
    """Whether the run in `folder` was evaluated on the images (names, classes, sizes of files) that `catalog` has now."""
    digests = read_tree(folder).get("images") or {}
    if "evaluated" in digests:
        same_files = digests.get("sizes") in (None, sizes_digest(catalog))  # None: of an earlier version
        return same_files and digests["evaluated"] == evaluation_digest(catalog)
    newest = checkpoint.latest(folder)  # of a run whose config.json has no digests yet
    return newest is not None and checkpoint.describe(newest).get("catalog") == catalog_digest(catalog)


def _open(config: Config, fresh: bool, made: list[Path]) -> Path:
    """The folder, made where it is not there; what was made is added to `made`, outermost first."""
    if config.run.output_dir:
        folder = Path(os.path.abspath(os.path.expanduser(config.run.output_dir)))
        if fresh and ((folder / "metrics.json").exists() or (folder / "checkpoints").exists()):
            raise UserError(f"{folder}: already holds a run: pass --resume to go on with it, or another --output-dir")
    else:
        folder = Path("outputs").absolute() / config.data.dataset / f"{config.method}-{config.model.model}"
    missing = [parent for parent in reversed(folder.parents) if not parent.exists()]
    try:
        if not config.run.output_dir:
            folder = _new_folder(folder)
            made += [*missing, folder]
        elif not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            made += [*missing, folder]
        (folder / ".writable").write_text("")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot write there ({error.strerror})") from error
    return folder


def _new_folder(stem: Path) -> Path:
    """stem-1, stem-2, …: the first that nobody has made, also not another process in the same moment."""
    number = 1
    while True:
        folder = stem.with_name(f"{stem.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _is_barren(folder: Path) -> bool:
    try:
        names = {entry.name for entry in os.scandir(folder)}
        log = folder / "log.jsonl"
        return names <= BARREN and not (log.exists() and log.stat().st_size)
    except OSError:
        return False


def _lock(folder: Path) -> IO[str]:
    """Hold the run's folder until the process ends. Raises UserError where another process trains in it."""
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"{folder}: another process is training in it: wait for it, or choose another --output-dir"
        ) from None
    return file
