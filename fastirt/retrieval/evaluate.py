"""An encoder on a catalogue's queries and gallery: embed, search, measure."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Mapping, Optional

import torch

from fastirt.catalog import Catalog, Split, check_ranks
from fastirt.config import Config
from fastirt.encoder import Encoder
from fastirt.input.loader import EvalLoader
from fastirt.retrieval.embed import Embeddings, embed, normalization_constants
from fastirt.retrieval.metrics import retrieval_metrics
from fastirt.step import resolve_precision

log = logging.getLogger("fastirt")


def evaluate(
    encoder: Encoder,
    catalog: Catalog,
    config: Config,
    device: torch.device,
    *,
    stores: Optional[Mapping[str, Any]] = None,
    csv_path: Optional[Path] = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The content of `metrics.json`. stores: picture sources by split name, where a packed store is read. Unreadable pictures are
    named in the log and in `csv_path`, left out, and counted as `bad`. Raises UserError for a K larger than the gallery before
    anything is embedded, and for embeddings that are not finite."""
    check_ranks(catalog, config.eval.rank)
    mean, std = normalization_constants(config, encoder)
    dtype = resolve_precision(config.model.precision, device)

    def embeddings(split: Split) -> tuple[Embeddings, torch.Tensor]:
        loader = EvalLoader(
            split,
            batch_size=config.eval.eval_batch_size,
            input=config.input,
            device=device,
            store=stores[split.name] if stores else None,
            csv_path=csv_path,
        )
        found = embed(
            encoder,
            loader,
            split.paths,
            mean=mean,
            std=std,
            device=device,
            dtype=dtype,
            name=split.name,
            progress=progress,
        )
        return found, torch.from_numpy(split.labels)[found.rows]

    query, query_labels = embeddings(catalog.query)
    gallery, gallery_labels = (query, query_labels) if catalog.gallery is None else embeddings(catalog.gallery)
    total = len(catalog.query) + (len(catalog.gallery) if catalog.gallery else 0)
    read = len(query.rows) + (len(gallery.rows) if catalog.gallery else 0)
    reachable = len(gallery.rows) - (1 if catalog.gallery is None else 0)
    ranks = [k for k in config.eval.rank if k <= reachable]
    if len(ranks) < len(config.eval.rank):
        log.warning("left out Recall@K for K above %d: so many gallery pictures could be read", reachable)
    metrics = retrieval_metrics(
        query.vectors,
        query_labels,
        gallery.vectors,
        gallery_labels,
        ranks,
        same=catalog.gallery is None,
        backend=config.eval.search,
        device=device,
    )
    return {**metrics, "bad": total - read}
