"""Evaluation of an encoder on a data set: embed, search, measure."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Mapping, Optional

import torch
from torch import Tensor

from fastirt.config.options import Config
from fastirt.datasets import Catalog, Split, check_recall_ks
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.loading.cache_budget import EvalCaches
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.encoder import Encoder, normalization_constants
from fastirt.model.precision import resolve_precision
from fastirt.retrieval.embed import Embeddings, embed
from fastirt.retrieval.metrics import retrieval_metrics

log = logging.getLogger("fastirt")


def evaluate(
    encoder: Encoder,
    catalog: Catalog,
    config: Config,
    device: torch.device,
    *,
    stores: Optional[Mapping[str, Any]] = None,
    csv_path: Optional[Path] = None,
    caches: Optional[EvalCaches] = None,
    progress: bool = True,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Embed queries and gallery, and compute the metrics of `metrics.json`.

    Args:
        encoder: on `device`.
        catalog: the data set, with a query split.
        config: options of input, precision, search and K.
        device: of the encoder.
        stores: image sources by split name, to read from a packed store.
        csv_path: file for a row per unreadable image.
        caches: of a run that evaluates again, which then decodes nothing; None: nothing is kept.
        progress: show progress bars.
        ranks: processes that share the embedding; the main rank searches on all GPUs of its node.

    Returns:
        As `retrieval_metrics`, and the number of unreadable images as `bad`; equal on all ranks.

    Raises:
        UserError: a K is larger than the gallery (before anything is embedded), too many images are
            unreadable, or embeddings are not finite.
    """
    check_recall_ks(catalog, config.eval.rank)
    mean, std = normalization_constants(config, encoder)
    dtype = resolve_precision(config.model.precision, device)

    splits = [catalog.query] if catalog.gallery is None else [catalog.query, catalog.gallery]
    loaders = {
        split.name: EvalLoader(
            split,
            batch_size=config.eval.eval_batch_size,
            input=config.input,
            device=device,
            store=stores[split.name] if stores else None,
            csv_path=csv_path,
            ranks=ranks,
        )
        for split in splits
    }
    if caches is not None:
        for name, cache in caches.of({name: len(loader.own_rows) for name, loader in loaders.items()}).items():
            loaders[name].keep_in(cache)

    def embeddings(split: Split) -> Optional[Embeddings]:
        return embed(
            encoder,
            loaders[split.name],
            split.paths,
            mean=mean,
            std=std,
            device=device,
            dtype=dtype,
            name=split.name,
            progress=progress,
            ranks=ranks,
        )

    query = embeddings(catalog.query)
    gallery = query if catalog.gallery is None else embeddings(catalog.gallery)
    return ranks.host.run_on_main(lambda: _measure(query, gallery, catalog, config, device, ranks))


def _measure(
    query: Embeddings, gallery: Embeddings, catalog: Catalog, config: Config, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    query_labels = torch.from_numpy(catalog.query.labels)[query.rows]
    gallery_labels = torch.from_numpy((catalog.gallery or catalog.query).labels)[gallery.rows]
    total = len(catalog.query) + (len(catalog.gallery) if catalog.gallery else 0)
    read = len(query.rows) + (len(gallery.rows) if catalog.gallery else 0)
    exclude = _excluded_rows(query, gallery, catalog)
    reachable = len(gallery.rows) - bool((exclude >= 0).any())
    ks = set(config.eval.rank)
    depths = [k for k in ks if k <= reachable]
    if len(depths) < len(ks):
        beside = " beside the query" if reachable < len(gallery.rows) else ""
        log.warning("left out Recall@K for K above %d, the number of readable gallery images%s", reachable, beside)
    metrics = retrieval_metrics(
        query.vectors,
        query_labels,
        gallery.vectors,
        gallery_labels,
        depths,
        exclude=exclude,
        backend=config.eval.search,
        device=device,
        gpus=ranks.local_world_size,
    )
    return {**metrics, "bad": total - read}


def _excluded_rows(query: Embeddings, gallery: Embeddings, catalog: Catalog) -> Tensor:
    """(Q,) int64: for each embedded query the embedded gallery row of its own file, or -1."""
    if catalog.gallery is None:
        return torch.arange(len(query.rows))
    if catalog.own is None:
        return torch.full((len(query.rows),), -1)
    # Gallery row to embedded row, -1 if unreadable; the last element serves queries without a row.
    embedded_row = torch.full((len(catalog.gallery) + 1,), -1)
    embedded_row[gallery.rows] = torch.arange(len(gallery.rows))
    return embedded_row[torch.from_numpy(catalog.own)[query.rows]]
