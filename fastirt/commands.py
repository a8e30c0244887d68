"""`fastirt train` and `fastirt evaluate`, from flags to metrics: data, folder, encoder, training, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch

from fastirt.config.options import TRAINING_OPTIONS, Config
from fastirt.datasets import Catalog, check_recall_ks, load_dataset, reachable, warn_of_copies
from fastirt.datasets.digest import catalog_digest
from fastirt.distributed.device import choose_device
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.images.packed_store import PackedStore
from fastirt.model.build import build_encoder
from fastirt.model.encoder import Encoder, normalization_constants
from fastirt.model.save import save_model
from fastirt.model.weights.timm_line import NO_LINE, loading_line
from fastirt.objective.cross_batch_memory import memory_size
from fastirt.retrieval.evaluate import evaluate
from fastirt.retrieval.report import table, write_metrics
from fastirt.run_config import ARCHITECTURE, described_by_file, finalized, fresh_config, with_flags
from fastirt.training.consistency import check_same_setup
from fastirt.training.resume import after_restart, checkpoint_to_resume
from fastirt.training.run_folder import holds_images_of, read_config, run_folder, write_config
from fastirt.training.trainer import Trainer

log = logging.getLogger("fastirt")

# Options that leave the figures of an evaluation as the run had them.
RESULT_NEUTRAL_OPTIONS = {"device", "num_workers", "pin_mem", "eval_batch_size", "search"}


def train(flags: dict[str, Any], ranks: Ranks) -> int:
    """`fastirt train`: returns the exit code. Raises UserError for anything the user can mend."""
    device = choose_device(flags.get("device"), ranks)
    ranks.start(device)
    flags = after_restart(flags, ranks)
    found = ranks.host.run_on_main(lambda: str(checkpoint_to_resume(flags) or ""))
    resume = Path(found) if found else None
    if resume:
        folder = resume.parent.parent
        config = with_flags(read_config(folder, resume), folder, flags)
    else:
        described = described_by_file(flags)
        config = fresh_config(
            {**{name: described[name] for name in ARCHITECTURE & set(described)}, **flags}, "train", ranks
        )
    config = finalized(config, device, ranks.world_size)
    log.info("train: %s, %s%s", config.method, config.describe_input(), f"; resumes {resume}" if resume else "")
    catalog, store = _data(config, ranks, training=config.optim.max_iter > 0)
    _fits(config, catalog)
    recall_at = _reachable_ks(config, catalog, "rank" in flags, ranks)
    with run_folder(config, "resume" not in flags, ranks) as folder:
        return _train_in(folder, config, catalog, store, resume, device, ranks, recall_at)


def _train_in(
    folder: Path,
    config: Config,
    catalog: Catalog,
    store: Optional[dict[str, Any]],
    resume: Optional[Path],
    device: torch.device,
    ranks: Ranks,
    recall_at: Sequence[int],
) -> int:
    config = config.replace(output_dir=str(folder), resume=None)
    if resume is None and ranks.is_main:
        (folder / "bad_pictures.csv").unlink(missing_ok=True)  # of an attempt that got nowhere
    torch.manual_seed(config.run.seed)
    model = dataclasses.replace(config.model, weights="scratch") if resume else config.model
    encoder = build_encoder(model, config.input.input_size)
    check_same_setup(ranks, config, catalog, encoder)
    log.info("%s", summary(config, catalog, encoder, folder))

    def measure(model: Encoder) -> dict[str, Any]:
        measured = config.replace(rank=recall_at)
        bad = folder / "bad_pictures.csv"
        return evaluate(model, catalog, measured, device, stores=store, csv_path=bad, ranks=ranks)

    if config.optim.max_iter > 0:
        trainer = Trainer(
            encoder,
            catalog,
            config,
            folder,
            device,
            evaluate=measure if catalog.query is not None else None,
            store=store and store["train"],
            resume=resume,
            ranks=ranks,
        )
        ranks.host.run_on_main(lambda: write_config(folder, config, catalog, trainer.digest))
        if code := trainer.run():
            return code
        metrics = trainer.metrics
    else:
        ranks.host.run_on_main(lambda: write_config(folder, config, catalog, catalog_digest(catalog)))
        if ranks.is_main:
            save_model(encoder, folder / "model.safetensors", config)
        metrics = measure(encoder.to(device, memory_format=torch.channels_last))
    if ranks.is_main:
        _report(metrics, config, folder)
        line = loading_line(encoder, folder / "model.safetensors")
        mean, std = (tuple(round(v, 4) for v in values) for values in normalization_constants(config, encoder))
        log.info("in plain timm, x of mean %s and std %s: %s", mean, std, line or NO_LINE)
    return 0


def evaluate_model(run: Optional[Path], flags: dict[str, Any], ranks: Ranks) -> int:
    """`fastirt evaluate`: of a run's final model, a weights file, or the model off the shelf."""
    if run is not None and not run.exists():
        raise UserError(f"{run}: no such run folder or file of weights")
    of_run = run is not None and run.is_dir()
    if of_run:
        if not (run / "model.safetensors").is_file():
            raise UserError(
                f"{run}: no model.safetensors there: not a finished run; `fastirt train --resume {run}` goes on with one"
            )
        stored = read_config(run)
        if flags.get("method", stored.method) != stored.method:
            raise UserError(f"--method {flags['method']}: {run} is a run of {stored.method}: leave --method out")
        config = with_flags(stored, run, {"weights": str(run / "model.safetensors"), **flags})
        place = f"; {run}, which ran on {stored.run.device}, now on"
    else:
        if run is not None and "weights" in flags:
            raise UserError(f"{run} and --weights {flags['weights']}: two models to evaluate: leave one of them out")
        flags = {**flags, "weights": str(run)} if run is not None else flags
        described = described_by_file(flags)
        config = fresh_config({**described, **flags}, "evaluate", ranks)
        place = "; on"
    device = choose_device(flags.get("device"), ranks)
    ranks.start(device)
    config = finalized(config, device)
    unused = [f"--{name.replace('_', '-')}" for name in flags if name in TRAINING_OPTIONS and name != "max_iter"]
    if unused and ranks.is_main:
        log.warning("evaluate: %s: for training alone, changes nothing here", ", ".join(unused))
    what = f"{config.method}, {config.describe_input()}; eval split {config.eval.eval_split}"
    log.info("evaluate: %s%s %s in %s", what, place, device, config.model.precision)
    catalog, store = _data(config, ranks, training=False)
    recall_at = _reachable_ks(config, catalog, "rank" in flags, ranks)

    def measure_in(folder: Path) -> None:
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model, config.input.input_size).to(device, memory_format=torch.channels_last)
        check_same_setup(ranks, config.replace(output_dir=str(folder)), catalog, encoder)
        log.info("%s", summary(config, catalog, encoder, folder))
        bad = folder / "bad_pictures.csv"
        measured = config.replace(rank=recall_at)
        metrics = evaluate(encoder, catalog, measured, device, stores=store, csv_path=bad, ranks=ranks)
        if ranks.is_main:
            _report(metrics, config, folder)

    if of_run and ranks.host.run_on_main(lambda: _are_the_runs_own(run, flags, catalog)):
        measure_in(Path(os.path.abspath(run)))
        return 0
    with run_folder(config.replace(output_dir=flags.get("output_dir")), True, ranks) as folder:
        written = config.replace(output_dir=str(folder))
        ranks.host.run_on_main(lambda: write_config(folder, written, catalog, catalog_digest(catalog)))
        measure_in(folder)
    return 0


def _are_the_runs_own(run: Path, flags: dict[str, Any], catalog: Catalog) -> bool:
    """Whether an evaluation with these flags gives the figures that belong into the run's own metrics.json."""
    same = holds_images_of(run, catalog)
    if not same:
        log.warning("%s: these are not the images that the run was evaluated on: its metrics.json stays as it is", run)
    return same and set(flags) <= RESULT_NEUTRAL_OPTIONS


def summary(config: Config, catalog: Catalog, encoder: Encoder, folder: Path) -> str:
    """One line: what runs, on what, into where."""
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    splits = ", ".join(f"{len(split)} {split.name}" for split in catalog.splits())
    return (
        f"{config.method} ({config.recipe}): {config.model.model}, {millions:.2f} M parameters; "
        f"{config.data.dataset}: {splits} images; {config.run.device}; into {folder}"
    )


def _data(config: Config, ranks: Ranks, training: bool) -> tuple[Catalog, Optional[dict[str, Any]]]:
    """The catalogue, and image sources by split name where a packed store is used."""
    with _only_first_warns(ranks):
        catalog = load_dataset(
            config.data.dataset, config.data.data_path, eval_split=config.eval.eval_split, training=training
        )
    if ranks.is_main:
        warn_of_copies(catalog)
    if config.data.packed is None:
        return catalog, None
    store = PackedStore.open(Path(config.data.packed))
    store.check(catalog, config.input.resize, config.input.resize_size, config.input.orientation)
    return catalog, {split.name: store.split(split) for split in catalog.splits()}


@contextlib.contextmanager
def _only_first_warns(ranks: Ranks) -> Iterator[None]:
    """All ranks read the same data set and would say the same of it."""
    level = log.level
    if not ranks.is_main:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _reachable_ks(config: Config, catalog: Catalog, asked: bool, ranks: Ranks) -> Sequence[int]:
    """The K of Recall@K. Raises UserError for one above what the gallery holds where the user asked for it; a preset's is left out."""
    most = reachable(catalog)
    if asked or most is None or max(config.eval.rank) <= most:
        check_recall_ks(catalog, config.eval.rank)
        return config.eval.rank
    fitting = tuple(k for k in config.eval.rank if k <= most) or (1,)
    if ranks.is_main:
        log.warning("%s: left out Recall@K for K above %d: the gallery has no more images", catalog.place, most)
    return fitting


def _fits(config: Config, catalog: Catalog) -> None:
    """What can only be checked once the training set is known."""
    if not config.optim.max_iter:
        return
    slots = memory_size(config, len(catalog.train))
    if config.memory.memory_ratio > 0 and slots < config.optim.batch_size:
        raise UserError(
            f"--batch-size {config.optim.batch_size}: larger than the memory, which holds {slots} "
            f"(--memory-ratio {config.memory.memory_ratio} of {len(catalog.train)} training images): lower it, "
            "raise the ratio, or pass --memory-ratio 0"
        )


def _report(metrics: dict[str, Any], config: Config, folder: Path) -> None:
    """Write metrics.json and print the table, published rows beside it."""
    if not metrics:  # no test split
        return
    write_metrics(folder / "metrics.json", metrics)
    print(table(metrics, config.data.dataset, config.method, config.model.model, config.recipe))
    log.info("wrote %s", folder / "metrics.json")
