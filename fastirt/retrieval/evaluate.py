"""Evaluation of an encoder on a data set: embed, search, measure."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

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
from fastirt.retrieval.metrics import PositivesByLabel, QueryMetrics, summarize
from fastirt.retrieval.metrics.per_query_file import check_per_query_file, per_query_table, write_per_query_file
from fastirt.retrieval.ranks import shared_ranks

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
    per_query: Optional[Path] = None,
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
        per_query: .csv or .parquet file for a row per query, as `write_per_query_file` says.
        progress: show progress bars.
        ranks: processes that share the embedding and the ranking.

    Returns:
        As `retrieval_metrics`, and the number of unreadable images as `bad`; equal on all ranks.

    Raises:
        UserError: a K is larger than the gallery or `per_query` cannot be written (before anything
            is embedded), too many images are unreadable, or embeddings are not finite.
    """
    check_recall_ks(catalog, config.eval.rank)
    ranks.host.run_on_main(lambda: check_per_query_file(per_query))
    query, gallery = embed_splits(
        encoder,
        catalog,
        config,
        device,
        stores=stores,
        csv_path=csv_path,
        caches=caches,
        progress=progress,
        ranks=ranks,
    )
    depths: list[int] = []
    labelled: Optional[PositivesByLabel] = None

    def prepare() -> tuple[int, list[tuple[int, int]]]:
        nonlocal labelled
        exclude = excluded_rows(query, gallery, catalog)
        depths.extend(_reachable_ks(config.eval.rank, len(gallery.rows), bool((exclude >= 0).any())))
        labels = labels_of(catalog.query, query), labels_of(catalog.gallery or catalog.query, gallery)
        labelled = PositivesByLabel(query.vectors, labels[0], gallery.vectors, labels[1], depths, exclude)
        return labelled.depth, labelled.parts

    # Errors are raised on all ranks, before these share the work.
    depth, parts = ranks.host.run_on_main(prepare)
    measured, tables = [], []
    for first, stop in parts:
        of_main: tuple[Any, ...] = (None,) * 4
        if labelled is not None:
            of_main = (query.vectors[first:stop], gallery.vectors, *labelled.lists(first, stop))
        found = shared_ranks(
            ranks.host,
            *of_main,
            backend=config.eval.search,
            device=device,
            depth=depth,
            progress=progress and ranks.is_main,
        )
        if found is not None:
            measured.append(QueryMetrics.of_ranks(found, depths, labelled.largest))
        if found is not None and per_query is not None:
            of_gallery = (catalog.gallery or catalog.query, gallery.rows)
            of_query = (catalog.query, query.rows[first:stop])
            tables.append(per_query_table(found, *of_query, *of_gallery, catalog.class_names))

    def summary() -> dict[str, Any]:
        if per_query is not None:
            write_per_query_file(per_query, tables)
            log.info("wrote %s", per_query)
        metrics = summarize(QueryMetrics.joined(measured), labels_of(catalog.query, query), config.eval.average)
        bad = len(catalog.query) - len(query.rows)
        bad += 0 if catalog.gallery is None else len(catalog.gallery) - len(gallery.rows)
        return {**metrics, "gallery": len(gallery.rows), "bad": bad}

    return ranks.host.run_on_main(summary)


def embed_splits(
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
) -> tuple[Optional[Embeddings], Optional[Embeddings]]:
    """(queries, gallery) as `evaluate` embeds them, its arguments; one object without a gallery.

    None on ranks other than the main one. Raises UserError as `embed`.
    """
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
    return query, query if catalog.gallery is None else embeddings(catalog.gallery)


def labels_of(split: Split, read: Embeddings) -> Tensor:
    """(N,) int64 of the images that were embedded."""
    return torch.from_numpy(split.labels)[read.rows]


def _reachable_ks(ks: Sequence[int], gallery: int, excludes: bool) -> list[int]:
    """Those K for which the readable gallery images are enough; the others are logged."""
    reachable = gallery - excludes
    depths = [k for k in set(ks) if k <= reachable]
    if len(depths) < len(set(ks)):
        beside = " beside the query" if excludes else ""
        log.warning("left out Recall@K for K above %d, the number of readable gallery images%s", reachable, beside)
    return depths


def excluded_rows(query: Embeddings, gallery: Embeddings, catalog: Catalog) -> Tensor:
    """(Q,) int64: for each embedded query the embedded gallery row of its own file, or -1."""
    if catalog.gallery is None:
        return torch.arange(len(query.rows))
    if catalog.own is None:
        return torch.full((len(query.rows),), -1)
    # Gallery row to embedded row, -1 if unreadable; the last element serves queries without a row.
    embedded_row = torch.full((len(catalog.gallery) + 1,), -1)
    embedded_row[gallery.rows] = torch.arange(len(gallery.rows))
    return embedded_row[torch.from_numpy(catalog.own)[query.rows]]
