"""`fastirt train` and `fastirt evaluate`: from flags to data, folder, encoder and metrics."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Optional

import torch

from fastirt.config.options import TRAINING_OPTIONS, Config
from fastirt.datasets import Catalog
from fastirt.distributed.device import choose_device
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.loading.cache_budget import EvalCaches
from fastirt.model.build import build_encoder
from fastirt.model.encoder import Encoder
from fastirt.model.save import save_model
from fastirt.model.weights.timm_line import log_loading_line
from fastirt.objective.self_check import replace_faulty_kernels
from fastirt.retrieval.evaluate import evaluate
from fastirt.retrieval.report import read_metrics, table, write_metrics
from fastirt.run_config import (
    Data,
    SharedData,
    config_of_run,
    described_by_file,
    finalized,
    fresh_config,
    open_data,
    plan_training,
)
from fastirt.step.engine import engine_of_run
from fastirt.training.health_checks import check_same_setup
from fastirt.training.run_folder import RunFolder
from fastirt.training.trackers import check_trackers
from fastirt.training.trainer import Trainer

log = logging.getLogger("fastirt")

# Options that do not change an evaluation's figures.
RESULT_NEUTRAL_OPTIONS = {"device", "num_workers", "pin_mem", "eval_batch_size", "search", "self_check"}


def train(
    flags: dict[str, Any], ranks: Ranks, per_query: Optional[Path] = None, shared: Optional[SharedData] = None
) -> int:
    """`fastirt train`: returns the exit code. Raises UserError for anything the user can mend.

    shared: of several runs in this process, which print no tables.
    """
    device = choose_device(flags.get("device"), ranks)
    ranks.start(device)
    plan = plan_training(flags, ranks)
    config = finalized(plan.config, device, ranks.world_size)
    ranks.host.run_on_main(lambda: check_trackers(config.run.tracker))
    resumes = f"; resumes {plan.checkpoint}" if plan.checkpoint else ""
    log.info("train: %s, %s%s", config.method, config.describe_input(), resumes)
    asked_for_k, trains = "rank" in flags, config.optim.max_iter > 0
    data = shared.open(config) if shared else open_data(config, asked_for_k, per_query, ranks, training=trains)
    with RunFolder.open(config, plan.fresh, ranks) as folder, folder.locked(ranks):
        config = config.replace(output_dir=str(folder.path), resume=None)
        encoder = _build_encoder(config, data, folder, ranks, pretrained=plan.checkpoint is None)
        caches = shared.caches(config) if shared else None
        code, metrics = _fit(encoder, config, data, folder, plan.checkpoint, ranks, caches)
        if code == 0 and ranks.is_main and shared:
            write_metrics(folder.metrics, metrics)
        elif code == 0 and ranks.is_main:
            _report(metrics, config, folder)
            log_loading_line(encoder, config, folder.final_model)
    return code


def _fit(
    encoder: Encoder,
    config: Config,
    data: Data,
    folder: RunFolder,
    checkpoint: Optional[Path],
    ranks: Ranks,
    caches: Optional[EvalCaches],
) -> tuple[int, dict[str, Any]]:
    """(exit code, metrics of the final model).

    With --max-iter 0 the model is saved and measured as it is.
    caches: of an earlier run with the same preprocessing, and of later ones.
    """
    if caches is None and 0 < config.eval.eval_freq < config.optim.max_iter:  # evaluated more than once
        caches = EvalCaches(config.input, torch.device(config.run.device), ranks)

    def evaluate(model: Encoder) -> dict[str, Any]:
        return _measure(model, config, data, folder, ranks, caches)

    if checkpoint is None and ranks.is_main:
        # of an attempt that ended before its first checkpoint
        folder.bad_images.unlink(missing_ok=True)
    if config.optim.max_iter == 0:
        ranks.host.run_on_main(lambda: folder.write_config(config, data.catalog))
        if ranks.is_main:
            save_model(encoder, folder.final_model, config)
        return 0, evaluate(encoder.to(config.run.device, memory_format=torch.channels_last))
    config = config if checkpoint else config.replace(engine=engine_of_run(config, encoder, ranks))  # resumed: its own
    trainer = Trainer(
        encoder,
        data.catalog,
        config,
        folder,
        evaluate=evaluate if data.catalog.query is not None else None,
        source=data.sources and data.sources["train"],
        resume=checkpoint,
        cache=caches and caches.training,
        ranks=ranks,
    )
    if caches is not None:
        caches.training = trainer.loader.cache
    # After the trainer: a checkpoint that it refuses leaves config.json as it was.
    ranks.host.run_on_main(lambda: folder.write_config(config, data.catalog))
    return trainer.run(), trainer.metrics


def evaluate_model(run: Optional[Path], flags: dict[str, Any], ranks: Ranks, per_query: Optional[Path] = None) -> int:
    """`fastirt evaluate`: of a run's final model, a weights file, or a pretrained model."""
    if run is not None and not run.exists():
        raise UserError(f"{run}: no such run folder or file of weights")
    own_run = RunFolder(Path(os.path.abspath(run))) if run is not None and run.is_dir() else None
    if own_run is not None:
        config, place = config_of_run(run, flags)
    else:
        if run is not None and "weights" in flags:
            raise UserError(f"{run} and --weights {flags['weights']}: two models to evaluate: leave one of them out")
        flags = {**flags, "weights": str(run)} if run is not None else flags
        config, place = fresh_config({**described_by_file(flags), **flags}, "evaluate", ranks), "; on"
    device = choose_device(flags.get("device"), ranks)
    ranks.start(device)
    config = finalized(config, device)
    unused = [f"--{name.replace('_', '-')}" for name in flags if name in TRAINING_OPTIONS and name != "max_iter"]
    if unused and ranks.is_main:
        log.warning("evaluate: %s: for training alone, changes nothing here", ", ".join(unused))
    what = f"{config.method}, {config.describe_input()}; eval split {config.eval.eval_split}"
    log.info("evaluate: %s%s %s in %s", what, place, device, config.model.precision)
    data = open_data(config, "rank" in flags, per_query, ranks, training=False)

    def measure_in(folder: RunFolder) -> None:
        written = config.replace(output_dir=str(folder.path))
        encoder = _build_encoder(written, data, folder, ranks)
        encoder.to(device, memory_format=torch.channels_last)
        metrics = _measure(encoder, config, data, folder, ranks)
        if ranks.is_main:
            # A search of the nearest alone, as on a GPU, has fewer metrics than the file may have.
            before = read_metrics(folder.path, missing_is_empty=True) if folder is own_run else {}
            _report({**before, **metrics}, config, folder)

    if own_run is not None and ranks.host.run_on_main(lambda: _are_the_runs_own(own_run, flags, data.catalog)):
        measure_in(own_run)
        return 0
    with RunFolder.open(config.replace(output_dir=flags.get("output_dir")), True, ranks) as folder:
        written = config.replace(output_dir=str(folder.path))
        ranks.host.run_on_main(lambda: folder.write_config(written, data.catalog))
        measure_in(folder)
    return 0


def _build_encoder(config: Config, data: Data, folder: RunFolder, ranks: Ranks, pretrained: bool = True) -> Encoder:
    """The encoder, the same on all ranks. pretrained=False: a checkpoint brings the weights."""
    torch.manual_seed(config.run.seed)
    model = config.model if pretrained else dataclasses.replace(config.model, weights="scratch")
    encoder = build_encoder(model, config.input.input_size)
    check_same_setup(ranks, config, data.catalog, encoder)
    replace_faulty_kernels(config, ranks)
    log.info("%s", summary(config, data.catalog, encoder, folder.path))
    return encoder


def _measure(
    encoder: Encoder,
    config: Config,
    data: Data,
    folder: RunFolder,
    ranks: Ranks,
    caches: Optional[EvalCaches] = None,
) -> dict[str, Any]:
    return evaluate(
        encoder,
        data.catalog,
        config.replace(rank=data.recall_at),
        torch.device(config.run.device),
        stores=data.sources,
        csv_path=folder.bad_images,
        caches=caches,
        per_query=data.per_query,
        ranks=ranks,
    )


def _are_the_runs_own(run: RunFolder, flags: dict[str, Any], catalog: Catalog) -> bool:
    """Whether an evaluation with these flags belongs into the run's own metrics.json."""
    same = run.was_evaluated_on(catalog)
    if not same:
        log.warning(
            "%s: these are not the images that the run was evaluated on: its metrics.json stays as it is", run.path
        )
    return same and set(flags) <= RESULT_NEUTRAL_OPTIONS


def summary(config: Config, catalog: Catalog, encoder: Encoder, folder: Path) -> str:
    """One line: what runs, on what, into where."""
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    splits = ", ".join(f"{len(split)} {split.name}" for split in catalog.splits())
    return (
        f"{config.method} ({config.recipe}): {config.model.model}, {millions:.2f} M parameters; "
        f"{config.data.name}: {splits} images; {config.run.device}; into {folder}"
    )


def _report(metrics: dict[str, Any], config: Config, folder: RunFolder) -> None:
    """Write metrics.json and print the table, published rows beside it."""
    if not metrics:  # no test split
        return
    write_metrics(folder.metrics, metrics)
    print(table(metrics, config.data.name, config.method, config.model.model, config.recipe, config.eval.average))
    log.info("wrote %s", folder.metrics)
