"""The data of a sweep: validation classes split off the training set; images decoded once."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import torch

from fastirt.config.options import Config
from fastirt.config.random_streams import Purpose, stream
from fastirt.datasets import Catalog, Split, load_dataset, reachable_ks, unmatched_queries, warn_of_copies
from fastirt.datasets.records import assemble
from fastirt.errors import UserError
from fastirt.images.packed_store import packed_sources
from fastirt.loading.cache_budget import EvalCaches
from fastirt.objective.cross_batch_memory import check_memory_size
from fastirt.run_config import Data, SharedData


def split_off(train: Split, class_names: tuple[str, ...], share: float, seed: int, place: str) -> np.ndarray:
    """(N,) bool: which training images are of the validation classes, a share of the classes.

    Raises UserError where fewer than two classes would be left on either side.
    """
    names = sorted({class_names[label] for label in np.unique(train.labels)})
    count = max(2, round(share * len(names)))
    if len(names) - count < 2:
        raise UserError(
            f"{place}: {len(names)} training classes: validation: {share:g} takes {count} of them, and at least 2 must "
            "be left to train on: lower it, or use a data set of more classes"
        )
    chosen = {names[row] for row in stream(seed, Purpose.VALIDATION_CLASSES).permutation(len(names))[:count]}
    return np.array([class_names[label] in chosen for label in train.labels])


class HeldOut:
    """The training set of a data set as two splits, train and val; its test images are not used.

    Args:
        config: names the data set.
        share: of the training classes that are held out.
        seed: chooses them.

    Raises:
        UserError: the data set cannot be read, or has too few classes.
    """

    def __init__(self, config: Config, share: float, seed: int) -> None:
        self.full = load_dataset(config.data.dataset, config.data.data_path, training=True)
        train, names = self.full.train, self.full.class_names
        assert train is not None
        held = split_off(train, names, share, seed, self.full.place)
        self.rows = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
        records = {
            split: [(train.paths[row], names[train.labels[row]]) for row in rows] for split, rows in self.rows.items()
        }
        self.catalog: Catalog = assemble(self.full.dataset, self.full.root, records, self.full.source)
        if unmatched_queries(self.catalog).all():
            raise UserError(f"{self.full.place}: no validation class has two images: change seed or validation")
        warn_of_copies(self.catalog)
        self._caches: Optional[tuple[tuple[Any, ...], EvalCaches]] = None

    @property
    def shared(self) -> SharedData:
        return SharedData(self._open, self._caches_of)

    def _open(self, config: Config) -> Data:
        """The two splits for a run. Raises UserError where its options do not fit them."""
        if config.optim.max_iter:
            check_memory_size(config, len(self.rows["train"]))
        whole = packed_sources(config.data.packed, self.full, config.input)
        sources = whole and {
            split.name: whole["train"].part(split, self.rows[split.name]) for split in self.catalog.splits()
        }
        return Data(self.catalog, sources, reachable_ks(self.catalog, config.eval.rank, False), None)

    def _caches_of(self, config: Config) -> EvalCaches:
        """Those of the run before where the preprocessing is the same; else its memory is freed."""
        key = (config.input, config.data.packed, config.run.device)
        if self._caches is None or self._caches[0] != key:
            self._caches = None
            self._caches = key, EvalCaches(config.input, torch.device(config.run.device or "cpu"))
        return self._caches[1]
