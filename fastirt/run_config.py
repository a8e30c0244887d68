"""From flags to a configuration (presets, an earlier run, a model file, a packed store), and the
data that it names."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch

from fastirt.config.options import RECIPES, Config, save_interval
from fastirt.config.presets import resolve, scaled_resize
from fastirt.config.user_code import absolute, with_digest
from fastirt.config.validate import validate
from fastirt.datasets import Catalog, load_dataset, reachable_ks, warn_of_copies
from fastirt.distributed.launch import only_main_warns
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.images.decoders.choose import choose_loader
from fastirt.images.packed_store import PackedStore, packed_sources
from fastirt.loading.cache_budget import EvalCaches
from fastirt.model.precision import resolve_precision
from fastirt.model.save import description
from fastirt.model.weights.load import read_model_metadata
from fastirt.objective.cross_batch_memory import check_memory_size
from fastirt.retrieval.metrics.per_query_file import check_per_query_file
from fastirt.training import checkpoint
from fastirt.training.resume import after_restart, checkpoint_to_resume
from fastirt.training.run_folder import RunFolder

log = logging.getLogger("fastirt")

# Taken from a model file that training starts from: the architecture, not the recipe.
ARCHITECTURE = {"model", "model_kwargs", "pooling", "input_size"}


class Plan(NamedTuple):
    """What `fastirt train` sets out to do."""

    config: Config
    checkpoint: Optional[Path]  # to resume
    fresh: bool  # a folder that holds a run is refused


class Data(NamedTuple):
    """What a command reads: the catalogue, image sources by split where a packed store is used, and
    the K of Recall@K; and the file that its evaluations write a row per query to.
    """

    catalog: Catalog
    sources: Optional[dict[str, Any]]
    recall_at: Sequence[int]
    per_query: Optional[Path]


class SharedData(NamedTuple):
    """What several runs in one process share."""

    open: Callable[[Config], Data]
    caches: Callable[[Config], EvalCaches]  # equal ones for equal preprocessing


def plan_training(flags: dict[str, Any], ranks: Ranks) -> Plan:
    """From flags to a fresh run, or to the checkpoint that --resume or a restart names."""
    flags = after_restart(flags, ranks)
    found = ranks.host.run_on_main(lambda: str(checkpoint_to_resume(flags) or ""))
    fresh = "resume" not in flags
    if found:
        checkpoint_path = Path(found)
        folder = checkpoint_path.parent.parent
        config = with_flags(RunFolder(folder).read_config(checkpoint_path), folder, flags)
        return Plan(_with_digests(config), checkpoint_path, fresh)
    described = described_by_file(flags)
    architecture = {name: described[name] for name in ARCHITECTURE & set(described)}
    return Plan(_with_digests(fresh_config({**architecture, **flags}, "train", ranks)), None, fresh)


def _with_digests(config: Config) -> Config:
    """The configuration with the digests of the user's own code that shapes training, as it is now.

    Raises UserError for a missing file.
    """
    own = {"augment": config.input.augment, "objective": config.objective.objective}
    used = {name: text for name, text in own.items() if text is not None and config.optim.max_iter > 0}
    return config.replace(**{name: with_digest(f"--{name}", text) for name, text in used.items()})


def with_flags(stored: Config, folder: Path, flags: dict[str, Any]) -> Config:
    """The configuration of an earlier run in `folder`, with the flags of now on top."""
    resize_size = scaled_resize(flags, stored.input.input_size, stored.input.resize_size)
    own = {"output_dir": str(folder), "device": None, "resize_size": resize_size}
    return stored.replace(**{**own, **save_interval(flags), **flags, "resume": None})


def config_of_run(run: Path, flags: dict[str, Any]) -> tuple[Config, str]:
    """(configuration of a finished run with the flags on top, where it ran).

    Raises UserError for an unfinished one.
    """
    folder = RunFolder(run)
    if not folder.final_model.is_file():
        raise UserError(
            f"{run}: no {folder.final_model.name} there: not a finished run; "
            f"`fastirt train --resume {run}` goes on with one"
        )
    stored = folder.read_config()
    if flags.get("method", stored.method) != stored.method:
        raise UserError(f"--method {flags['method']}: {run} is a run of {stored.method}: leave --method out")
    config = with_flags(stored, run, {"weights": str(folder.final_model), **flags})
    return config, f"; {run}, which ran on {stored.run.device}, now on"


def fresh_config(flags: dict[str, Any], command: str, ranks: Ranks) -> Config:
    """The configuration of a new run.

    Images of a packed store are resized already: without --recipe their resize is used.
    """
    config = resolve(flags, command)
    if config.data.packed is None or "recipe" in flags:
        return config
    header = PackedStore.open(config.data.packed).header
    names = {"resize", "resize_size", "orientation"} & (set(header) - set(flags))
    # the recipe's resize goes with it: a store of another size is refused
    if "input_size" in flags:
        names.discard("resize_size")
    taken = {name: header[name] for name in sorted(names) if header[name] != getattr(config.input, name)}
    if taken and ranks.is_main:
        options = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in taken.items())
        log.warning("%s was packed with %s: taken instead of the recipe's", config.data.packed, options)
    return config.replace(**taken)


def finalized(config: Config, device: torch.device, ranks: int = 1) -> Config:
    """The checked configuration, with device, precision and decoder filled in. Raises UserError."""
    validate(config, ranks)
    loader = choose_loader(config.input.loader, device)
    precision = config.model.precision
    if precision == "auto":
        precision = "bf16" if resolve_precision(precision, device) == torch.bfloat16 else "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"  # the patch embedding is a convolution
    return _absolute(config.replace(device=str(device), precision=precision, loader=loader))


def _absolute(config: Config) -> Config:
    """Absolute paths: a stored relative path would name other files in another working folder."""
    paths = {"data_path": config.data.data_path, "packed": config.data.packed, "log_dir": config.run.log_dir}
    if _file_of_weights(config.model.weights):
        paths["weights"] = config.model.weights
    config = config.replace(dataset=absolute(config.data.dataset))
    return config.replace(**{name: path and os.path.abspath(os.path.expanduser(path)) for name, path in paths.items()})


def _file_of_weights(weights: Optional[str]) -> Optional[Path]:
    """The file or folder that --weights names; None for `scratch` (even if a file is called so), a
    timm tag or a missing file.
    """
    file = Path(os.path.expanduser(weights)) if weights and weights != "scratch" else None
    return file if file is not None and file.exists() else None


def described_by_file(flags: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the model file that --weights names, as flags; empty without any.

    Raises UserError if --model names another model.
    """
    weights = flags.get("weights")
    file = _file_of_weights(weights)
    if file is None:
        return {}
    state = checkpoint.describe(file) if file.is_file() else {}
    described = description(Config.from_dict(state["config"])) if "config" in state else read_model_metadata(file)
    if described and flags.get("model", described["model"]) != described["model"]:
        raise UserError(f"--model {flags['model']}: {file} says that it is of {described['model']}: leave --model out")
    if described:
        described["resize_size"] = scaled_resize(flags, described["input_size"], described["resize_size"])
    return {name: value for name, value in described.items() if name != "recipe" or value in RECIPES}


def open_data(config: Config, asked_for_k: bool, per_query: Optional[Path], ranks: Ranks, training: bool) -> Data:
    """Read and check the data set that `config` names. Raises UserError."""
    ranks.host.run_on_main(lambda: check_per_query_file(per_query))
    with only_main_warns(ranks):
        catalog = load_dataset(
            config.data.dataset, config.data.data_path, eval_split=config.eval.eval_split, training=training
        )
    if ranks.is_main:
        warn_of_copies(catalog)
    sources = packed_sources(config.data.packed, catalog, config.input)
    if training:
        check_memory_size(config, len(catalog.train))
    return Data(catalog, sources, reachable_ks(catalog, config.eval.rank, asked_for_k, log=ranks.is_main), per_query)
