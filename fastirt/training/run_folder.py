"""The run's folder: found or made, locked, described, and removed where a start fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterator, Optional

import torch

from fastirt import __version__
from fastirt.atomic import atomic_write, try_lock
from fastirt.config.options import Config
from fastirt.config.run_file import run_file_text
from fastirt.config.run_files import RunFiles
from fastirt.datasets import Catalog
from fastirt.datasets.digest import catalog_digest, evaluation_digest, sizes_digest
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.training import checkpoint

# A folder with nothing else, and no row in its log, is what a failed start left: it may be deleted.
_NAMES = RunFiles(Path())
_TRACKED = (_NAMES.tensorboard, _NAMES.wandb, _NAMES.mlflow, _NAMES.trackers)
BARREN = {path.name for path in (_NAMES.lock, _NAMES.config, _NAMES.run_file, _NAMES.log, *_TRACKED)}


class RunFolder(RunFiles):
    """A run's files, and what is done with the folder as a whole."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: Config, fresh: bool, ranks: Ranks) -> Iterator["RunFolder"]:
        """The run's folder, absolute, while the run lasts.

        A folder that was made here is removed again by an error before the first log row.
        fresh: refuse a folder that holds a run. Raises UserError on all ranks.
        """
        made: list[Path] = []
        folder = cls(Path(ranks.host.run_on_main(lambda: str(_find_or_make(config, fresh, made)))))
        try:
            yield folder
        except BaseException:
            if made and folder.is_barren():
                shutil.rmtree(folder.path, ignore_errors=True)
                for parent in reversed(made[:-1]):
                    # another run may have been started there since
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise

    @contextlib.contextmanager
    def locked(self, ranks: Ranks) -> Iterator[None]:
        """Hold the folder for this run.

        Raises UserError on all ranks where another process trains in it.
        """
        with contextlib.ExitStack() as held:

            def take() -> None:
                file = held.enter_context(open(self.lock, "w"))
                try:
                    is_free = try_lock(file)
                except OSError as error:
                    raise UserError(f"--output-dir {self.path}: cannot be locked ({error.strerror})") from error
                if not is_free:
                    raise UserError(
                        f"{self.path}: another process is training in it: wait for it, or choose another --output-dir"
                    )

            ranks.host.run_on_main(take)
            yield

    def write_config(self, config: Config, catalog: Catalog) -> None:
        """config.json: versions, torchrun's job, every option, and digests of the images; and the
        options as run.yaml.

        Raises UserError.
        """
        tree = {
            "fastirt": __version__,
            "torch": torch.__version__,
            "job": os.environ.get("TORCHELASTIC_RUN_ID"),
            "images": {
                "all": catalog_digest(catalog),
                "evaluated": evaluation_digest(catalog),
                "sizes": sizes_digest(catalog),
            },
            "config": config.to_dict(),
        }
        for file, text in ((self.config, json.dumps(tree, indent=1) + "\n"), (self.run_file, run_file_text(config))):
            try:
                with atomic_write(file) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"{file}: cannot be written ({error.strerror})") from error

    def read_tree(self) -> dict[str, Any]:
        """What `write_config` wrote; empty where there is nothing readable."""
        try:
            tree = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return tree if isinstance(tree, dict) else {}

    def read_config(self, saved: Optional[Path] = None) -> Config:
        """The configuration of the run, or of its checkpoint `saved`. Raises UserError."""
        path = saved or self.config
        try:
            tree = checkpoint.load(saved) if saved else json.loads(path.read_text(encoding="utf-8"))
            return Config.from_dict(tree["config"])
        except FileNotFoundError:
            raise UserError(f"{path}: missing, so {self.path} is not a run's folder") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read, or was made by another version of fastirt ({error})") from error

    def was_evaluated_on(self, catalog: Catalog) -> bool:
        """Whether the run was evaluated on the images (names, classes, sizes) of `catalog`."""
        digests = self.read_tree().get("images") or {}
        if "evaluated" in digests:
            # None: of an earlier version
            same_files = digests.get("sizes") in (None, sizes_digest(catalog))
            return same_files and digests["evaluated"] == evaluation_digest(catalog)
        # an earlier version wrote no digests into config.json
        newest = checkpoint.latest(self.path)
        return newest is not None and checkpoint.describe(newest).get("catalog") == catalog_digest(catalog)

    def is_barren(self) -> bool:
        try:
            names = {entry.name for entry in os.scandir(self.path)}
            return names <= BARREN and not (self.log.exists() and self.log.stat().st_size)
        except OSError:
            return False


def _find_or_make(config: Config, fresh: bool, made: list[Path]) -> Path:
    """The folder; every folder that had to be made is added to `made`, outermost first."""
    if config.run.output_dir:
        folder = Path(os.path.abspath(os.path.expanduser(config.run.output_dir)))
        files = RunFiles(folder)
        if fresh and (files.metrics.exists() or files.checkpoints.exists()):
            raise UserError(f"{folder}: already holds a run: pass --resume to go on with it, or another --output-dir")
    else:
        folder = Path("outputs").absolute() / config.data.name / f"{config.method}-{config.model.model}"
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
    """stem-1, stem-2, …: the first free one, also when several processes ask at the same moment."""
    number = 1
    while True:
        folder = stem.with_name(f"{stem.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
