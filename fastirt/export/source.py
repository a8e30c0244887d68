"""What is exported: a model, and the data set that proves the export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import timm
import torch

from fastirt.config.options import Config
from fastirt.config.run_files import RunFiles
from fastirt.datasets import Catalog, Split, load_dataset
from fastirt.distributed.device import choose_device
from fastirt.distributed.ranks import SINGLE_PROCESS
from fastirt.errors import UserError
from fastirt.images.packed_store import PackedStore
from fastirt.images.source import FileSource, ImageSource
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.build import build_encoder
from fastirt.model.encoder import Encoder
from fastirt.retrieval.report import read_metrics
from fastirt.run_config import described_by_file, finalized, fresh_config, with_flags
from fastirt.training.run_folder import RunFolder

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
        metrics: of the run's metrics.json; empty without one.
        log: rows of the run's log.jsonl.
        device: of the encoder.
    """

    name: str
    encoder: Encoder
    config: Config
    weights: Optional[str]
    catalog: Catalog
    packed: Optional[dict[str, Any]]
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    device: torch.device

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


def open_source(run: str, flags: dict[str, Any]) -> Source:
    """The model that `run` names: a run's folder, a model file, or a model of timm.

    flags: options of the data set and the device, instead of the run's.
    Raises UserError: no such model, an unfinished run, or missing images.
    """
    path = Path(run)
    device = choose_device(flags.get("device"), SINGLE_PROCESS)
    flags = {**flags, "precision": "fp32", "loader": LOADER}
    if "data_path" in flags:
        flags.setdefault("packed", None)  # it held the other images
    metrics: dict[str, Any] = {}
    log: list[dict[str, Any]] = []
    if path.is_dir():
        files = RunFiles(path)
        if not files.final_model.is_file():
            raise UserError(f"{run}: no {files.final_model.name} there: not a finished run")
        stored = RunFolder(path).read_config()
        config, weights = with_flags(stored, path, {"weights": str(files.final_model), **flags}), stored.model.weights
        metrics, log = read_metrics(path, missing_is_empty=True), _rows(files.log)
    else:
        named = {"weights": run} if path.is_file() else {"model": run}
        if not path.is_file() and not timm.is_model(run):
            raise UserError(f"{run}: no such run folder, model file or model of timm")
        config, weights = fresh_config({**described_by_file(named), **named, **flags}, "evaluate", SINGLE_PROCESS), run
    config = finalized(config, device)
    catalog, packed = _data(config)
    encoder = build_encoder(config.model, config.input.input_size).eval().requires_grad_(False).to(device)
    name = os.path.basename(os.path.abspath(run)) if path.exists() else run
    return Source(name, encoder, config, weights, catalog, packed, metrics, log, device)


def _data(config: Config) -> tuple[Catalog, Optional[dict[str, Any]]]:
    data = config.data
    catalog = load_dataset(data.dataset, data.data_path, eval_split=config.eval.eval_split, training=None)
    if catalog.query is None:
        raise UserError(
            f"{catalog.place}: no test images, and an export is proved by their Recall@1: "
            "name a data set that has some with --data-path"
        )
    if data.packed is None:
        return catalog, None
    store = PackedStore.open(Path(data.packed))
    store.check(catalog, config.input.resize, config.input.resize_size, config.input.orientation)
    return catalog, {split.name: store.split(split) for split in catalog.splits()}


def _rows(log: Path) -> list[dict[str, Any]]:
    """The rows of a log; empty without one, or where it is not readable."""
    try:
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
