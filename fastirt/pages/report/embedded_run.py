"""A finished run with the embeddings of its own test images, for a page about it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from fastirt.config.options import Config
from fastirt.datasets import Catalog, Split, load_dataset
from fastirt.errors import UserError
from fastirt.images.packed_store import PackedSplit, packed_sources
from fastirt.images.source import FileSource, ImageSource
from fastirt.inference.load import load
from fastirt.retrieval.embed import Embeddings
from fastirt.retrieval.evaluate import embed_splits, excluded_rows, labels_of
from fastirt.training.run_folder import RunFolder

log = logging.getLogger("fastirt")


class EmbeddedRun(NamedTuple):
    """What `fastirt evaluate RUN` searches.

    Attributes:
        config: of the run, with device and paths of now.
        catalog: its data set.
        query: embeddings of the readable queries.
        gallery: of the gallery; `query` itself where the split is its own gallery.
        exclude: (Q,) int64, the row of `gallery.vectors` that is the query's own file, or -1.
        sources: encoded images of query and gallery split.
        as_evaluated: whether these are the images that the run's metrics are of.
    """

    config: Config
    catalog: Catalog
    query: Embeddings
    gallery: Embeddings
    exclude: torch.Tensor
    sources: tuple[ImageSource, ImageSource]
    as_evaluated: bool

    @property
    def labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q,) and (G,) int64 classes of the embedded queries and gallery images."""
        splits = self.catalog.query, self.catalog.gallery or self.catalog.query
        return labels_of(splits[0], self.query), labels_of(splits[1], self.gallery)


class RunEmbedder:
    """Embeds runs one after the other; a data set that several share is read once.

    data_path: takes the place of the runs' own --data-path; None: theirs.
    """

    def __init__(self, data_path: Optional[str] = None) -> None:
        self.data_path = data_path
        self._catalogs: dict[tuple[str, ...], Catalog] = {}

    def __call__(self, run: Path) -> EmbeddedRun:
        """Raises UserError: not a finished run, or its data set cannot be read."""
        moved = {} if self.data_path is None else {"data_path": self.data_path, "packed": None}
        model = load(run, options=moved)
        config, device = model.config, model.device
        catalog = self._catalog(config)
        if catalog.query is None:
            raise UserError(f"{catalog.place}: has no test split")
        stores = packed_sources(config.data.packed, catalog, config.input)
        log.info("report: embedding %s by %s on %s", catalog.place, run, device)
        query, gallery = embed_splits(model.encoder, catalog, config, device, stores=stores)
        splits = catalog.query, catalog.gallery or catalog.query
        return EmbeddedRun(
            config,
            catalog,
            query,
            gallery,
            excluded_rows(query, gallery, catalog),
            (_source(splits[0], stores), _source(splits[1], stores)),
            RunFolder(run).was_evaluated_on(catalog),
        )

    def _catalog(self, config: Config) -> Catalog:
        key = config.data.dataset, config.data.data_path, config.eval.eval_split
        if key not in self._catalogs:
            self._catalogs[key] = load_dataset(*key[:2], eval_split=key[2], training=False)
        return self._catalogs[key]


def _source(split: Split, stores: Optional[dict[str, PackedSplit]]) -> ImageSource:
    return stores[split.name] if stores else FileSource(split.paths)
