"""What is exported: a model, and the data set that proves the export."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import timm
import torch

from fastirt.config.options import Config
from fastirt.datasets import Catalog, Split, load_dataset
from fastirt.errors import UserError
from fastirt.images.packed_store import packed_sources
from fastirt.images.source import FileSource, ImageSource
from fastirt.inference.load import load
from fastirt.inference.model import Model
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.encoder import Encoder
from fastirt.retrieval.report import read_metrics
from fastirt.run_config import finalized
from fastirt.training.run_folder import RunFolder
from fastirt.training.run_log import read_log

log = logging.getLogger("fastirt")

LOADER = "torchvision"  # its pixels are those of the exported graph; DALI's differ by 0.2 of 255 levels


class Source(NamedTuple):
    """A model with its data set.

    Attributes:
        name: of the run's folder or the model, for the card.
        encoder: on `device`, in evaluation mode.
        config: of the run, in fp32, with the decoder LOADER.
        weights: what the run started from, as its configuration says it.
        catalog: with a query split.
        packed: image sources by split of a packed store.
        metrics: of the run's metrics.json; empty without one, and for other images.
        measured: how the run measured them.
        log: rows of the run's log.jsonl.
        device: of the encoder.
        trained_on: the run's data set, where the proof is on other images; else empty.
    """

    name: str
    encoder: Encoder
    config: Config
    weights: Optional[str]
    catalog: Catalog
    packed: Optional[dict[str, Any]]
    metrics: dict[str, Any]
    measured: str
    log: list[dict[str, Any]]
    device: torch.device
    trained_on: str = ""

    def evaluated(self) -> list[Split]:
        """The query split, and the gallery if it is another one."""
        return [split for split in (self.catalog.query, self.catalog.gallery) if split is not None]

    def images(self, split: Split) -> ImageSource:
        """The encoded images of a split."""
        return FileSource(split.paths) if self.packed is None else self.packed[split.name]

    def loader(self, split: Split, rows: Optional[np.ndarray] = None) -> EvalLoader:
        """Batches of a split, or of some of its rows, whose indices are then of `rows`."""
        store = None if self.packed is None else self.packed[split.name]
        if rows is not None:
            split = Split(split.name, tuple(split.paths[row] for row in rows), split.labels[rows])
            store = store and _Rows(store, rows)
        return EvalLoader(
            split,
            batch_size=self.config.eval.eval_batch_size,
            input=self.config.input,
            device=self.device,
            store=store,
        )


class _Rows:
    """Some rows of a source of images, as an `ImageSource`."""

    def __init__(self, source: ImageSource, rows: np.ndarray) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, row: int) -> str:
        return self._source.path(int(self._rows[row]))

    def read(self, row: int) -> np.ndarray:
        return self._source.read(int(self._rows[row]))


def open_source(run: str | os.PathLike[str] | Model, flags: dict[str, Any]) -> Source:
    """The model that `run` is or names, as `fastirt.load` takes it, with its data set.

    flags: options of the data set and the device, instead of the run's.
    Raises UserError: no such model, an unfinished run, or missing images.
    """
    options = {name: value for name, value in flags.items() if name != "device"}
    if "data_path" in options:
        options.setdefault("packed", None)  # it held the other images
    options |= {"precision": "fp32", "loader": LOADER}
    if isinstance(run, Model):
        model, config = run, finalized(run.config.replace(**options), run.device)
        catalog, packed = _data(config)
        weights = config.model.weights
        return Source(config.model.model, model.encoder, config, weights, catalog, packed, {}, "", [], model.device)
    run = os.fspath(run)
    files = RunFolder(Path(run))
    is_run = files.path.is_dir()
    if not is_run and "data_path" not in options and (files.path.is_file() or timm.is_model(run)):
        raise UserError(f"{run}: no run's folder, so its test images are not known: name them with --data-path")
    model = load(run, device=flags.get("device"), options=options)
    stored = files.read_config() if is_run else None
    catalog, packed = _data(model.config)
    own = stored is not None and files.was_evaluated_on(catalog)
    if stored and not own:
        log.warning("%s: not the images that the run was evaluated on: the card has no results of the run", run)
    return Source(
        os.path.basename(os.path.abspath(run)) if files.path.exists() else run,
        model.encoder,
        model.config,
        stored.model.weights if stored else run,
        catalog,
        packed,
        read_metrics(files.path, missing_is_empty=True) if own else {},
        f"decoder {stored.input.loader}, {stored.model.precision}" if stored else "",
        read_log(files.log) if is_run else [],
        model.device,
        stored.data.name if stored and not own else "",
    )


def _data(config: Config) -> tuple[Catalog, Optional[dict[str, Any]]]:
    data = config.data
    catalog = load_dataset(data.dataset, data.data_path, eval_split=config.eval.eval_split, training=None)
    if catalog.query is None:
        raise UserError(
            f"{catalog.place}: no test images, and an export is proved by their Recall@1: "
            "name a data set that has some with --data-path"
        )
    return catalog, packed_sources(data.packed, catalog, config.input)
