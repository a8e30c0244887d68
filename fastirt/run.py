"""One run, from flags to metrics: folder, data, encoder, training, evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any, Optional

import torch

from fastirt import __version__, checkpoint
from fastirt.catalog import Catalog, check_ranks, load_catalog
from fastirt.config import RECIPES, Config
from fastirt.distributed import Ranks
from fastirt.encoder import Encoder, build_encoder, save_model
from fastirt.errors import UserError
from fastirt.files import replacing
from fastirt.input.pack import PackedStore
from fastirt.presets import resolve
from fastirt.replicas import check_start
from fastirt.retrieval.embed import normalization_constants
from fastirt.retrieval.evaluate import evaluate
from fastirt.retrieval.report import table, write_metrics
from fastirt.step import memory_size, resolve_precision
from fastirt.trainer import Trainer
from fastirt.validate import choose_device, validate
from fastirt.weights import read_model_metadata

log = logging.getLogger("fastirt")

NEUTRAL = {
    "device",
    "num_workers",
    "pin_mem",
    "eval_batch_size",
    "search",
}  # an evaluation with these gives the run's own figures


def train(given: dict[str, Any], ranks: Ranks) -> int:
    """`fastirt train`: returns the exit code. Raises UserError for anything the user can mend."""
    device = choose_device(given.get("device"), ranks)
    ranks.start(device)
    given = _restarted(given, ranks)
    found = ranks.from_first(lambda: str(_resume_from(given) or ""))
    resume = Path(found) if found else None
    config = _stored(resume.parent.parent, given, resume) if resume else resolve(given)
    config = _ready(config, device, ranks.size)
    catalog, store = _data(config)
    _fits(config, catalog)
    folder = Path(ranks.from_first(lambda: str(_folder(config, fresh="resume" not in given))))
    config = config.replace(output_dir=str(folder), resume=None)
    if resume is None and ranks.first:
        (folder / "bad_pictures.csv").unlink(missing_ok=True)  # of an attempt that got nowhere
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(
        dataclasses.replace(config.model, weights="scratch") if resume else config.model, config.input.input_size
    )
    check_start(ranks, config, catalog, encoder)
    log.info("%s", summary(config, catalog, encoder, folder))

    def measure(model: Encoder) -> dict[str, Any]:
        return evaluate(model, catalog, config, device, stores=store, csv_path=folder / "bad_pictures.csv", ranks=ranks)

    if config.optim.max_iter > 0:
        mean, std = normalization_constants(config, encoder)
        trainer = Trainer(
            encoder,
            catalog,
            config,
            folder,
            device,
            mean=mean,
            std=std,
            evaluate=measure,
            store=store and store["train"],
            resume=resume,
            ranks=ranks,
        )
        ranks.from_first(lambda: _write_config(folder, config))
        code = trainer.run()
        if code:
            return code
        metrics = trainer.metrics
    else:
        ranks.from_first(lambda: _write_config(folder, config))
        if ranks.first:
            save_model(encoder, folder / "model.safetensors", config)
        metrics = measure(encoder.to(device, memory_format=torch.channels_last))
    if ranks.first:
        _report(metrics, config, folder)
    return 0


def evaluate_model(run: Optional[Path], given: dict[str, Any], ranks: Ranks) -> int:
    """`fastirt evaluate`: of a run's final model, a weights file, or the model off the shelf."""
    folder: Optional[Path] = None
    if run is not None and not run.exists():
        raise UserError(f"{run}: no such run folder or file of weights")
    if run is not None and run.is_dir():
        if not (run / "model.safetensors").is_file():
            raise UserError(
                f"{run}: no model.safetensors there: not a finished run; `fastirt train --resume {run}` goes on with one"
            )
        config = _stored(run, {"weights": str(run / "model.safetensors"), **given})
        folder = run if set(given) <= NEUTRAL else None  # other figures than the run's own go elsewhere
    elif run is not None:
        config = resolve({**_described(run, given), "weights": str(run), "max_iter": 0, **given})
    else:
        described = (
            _described(Path(given["weights"]), given) if given.get("weights", "").endswith(".safetensors") else {}
        )
        config = resolve({**described, "max_iter": 0, **given})
    device = choose_device(given.get("device"), ranks)
    ranks.start(device)
    config = _ready(config, device)
    catalog, store = _data(config)
    if folder is None:
        folder = Path(
            ranks.from_first(lambda: str(_folder(config.replace(output_dir=given.get("output_dir")), fresh=True)))
        )
        ranks.from_first(lambda: _write_config(folder, config.replace(output_dir=str(folder))))
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config.model, config.input.input_size).to(device, memory_format=torch.channels_last)
    check_start(ranks, config.replace(output_dir=str(folder)), catalog, encoder)
    metrics = evaluate(
        encoder, catalog, config, device, stores=store, csv_path=folder / "bad_pictures.csv", ranks=ranks
    )
    if ranks.first:
        _report(metrics, config, folder)
    return 0


def summary(config: Config, catalog: Catalog, encoder: Encoder, folder: Path) -> str:
    """One line: what runs, on what, into where."""
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    gallery = f", {len(catalog.gallery)} gallery" if catalog.gallery else ""
    return (
        f"{config.method} ({config.recipe}): {config.model.model}, {millions:.2f} M parameters; {config.data.dataset}: {len(catalog.train)} training, "
        f"{len(catalog.query)} query{gallery} pictures; {config.run.device}; into {folder}"
    )


def _restarted(given: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The flags as they were meant when torchrun starts the same command again after a failure (--max-restarts): go on.

    Without --output-dir the folder is then named after the job, so that the next attempt finds it. An agent counts its own ranks' failures
    alone, so the largest count is taken; the run's folder remembers its job, since an attempt may also have been refused a folder of another.
    """
    mine = [os.environ.get(f"TORCHELASTIC_{name}") for name in ("RUN_ID", "MAX_RESTARTS", "RESTART_COUNT")]
    everyone = ranks.gather_json(mine)
    job, most, attempts = mine[0], *(max(int(other[i] or 0) for other in everyone) for i in (1, 2))
    if not job or not most:
        return given
    if not given.get("resume") and not given.get("output_dir"):
        if job == "none":
            raise ranks.once(
                "torchrun --max-restarts: pass --output-dir too, or the next attempt cannot find this one's checkpoints"
            )
        given = {**given, "output_dir": str(Path("outputs") / f"job-{job}")}
    folder = Path(given.get("output_dir") or given["resume"])
    folder = folder.parent.parent if folder.is_file() else folder  # --resume RUN/checkpoints/step_N.safetensors

    def goes_on() -> bool:
        return _job_of(folder) in (None, job) and ("resume" not in given or checkpoint.find(folder) is not None)

    return {**given, "output_dir": str(folder), "resume": ""} if attempts and ranks.from_first(goes_on) else given


def _job_of(folder: Path) -> Optional[str]:
    """The torchrun job that last trained in a run's folder."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("job")
    except (OSError, ValueError, AttributeError):
        return None


def _resume_from(given: dict[str, Any]) -> Optional[Path]:
    """The checkpoint to go on from, or None. `--resume` alone means --output-dir, where nothing yet is a fresh start."""
    if "resume" not in given:
        return None
    where = given["resume"] or given.get("output_dir")
    if not where:
        raise UserError("--resume needs a run folder: --resume FOLDER, or --output-dir FOLDER --resume")
    found = checkpoint.find(Path(where))
    if found is None:
        if given["resume"]:
            raise UserError(
                f"--resume {where}: no checkpoint there (looked for {Path(where) / 'checkpoints'}/step_*.safetensors)"
            )
        log.info("no checkpoint in %s yet: starting from step 0", where)
    return found


def _stored(folder: Path, given: dict[str, Any], saved: Optional[Path] = None) -> Config:
    """The configuration of an earlier run (of its checkpoint `saved`, where there is one), with the flags that were given now on top."""
    path = saved or folder / "config.json"
    try:
        tree = checkpoint.load(saved)["config"] if saved else json.loads(path.read_text(encoding="utf-8"))["config"]
        config = Config.from_dict(tree)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so {folder} is not a run's folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read, or was made by another version of fastirt ({error})") from error
    if "device" not in given and config.run.device:
        log.info("%s: ran on %s with precision %s", folder, config.run.device, config.model.precision)
    return config.replace(**{"output_dir": str(folder), "device": None, **given, "resume": None})


def _ready(config: Config, device: torch.device, ranks: int = 1) -> Config:
    """Checked, with the device and what follows from it filled in."""
    validate(config, ranks)
    precision = config.model.precision
    if precision == "auto":
        precision = "bf16" if resolve_precision(precision, device) == torch.bfloat16 else "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"  # the patch embedding is a convolution
    return config.replace(device=str(device), precision=precision)


def _described(file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What a model file of ours says of itself, as flags; nothing for others. Raises UserError where another model was `given`."""
    if file.suffix != ".safetensors" or not file.is_file():
        return {}
    described = read_model_metadata(file)
    if described and given.get("model", described["model"]) != described["model"]:
        raise UserError(f"--model {given['model']}: {file} says that it is of {described['model']}: leave --model out")
    return {name: value for name, value in described.items() if name != "recipe" or value in RECIPES}


def _data(config: Config) -> tuple[Catalog, Optional[dict[str, Any]]]:
    """The catalogue, and picture sources by split name where a packed store is used."""
    catalog = load_catalog(config.data.dataset, config.data.data_path)
    check_ranks(catalog, config.eval.rank)
    if config.data.packed is None:
        return catalog, None
    store = PackedStore.open(Path(config.data.packed))
    store.check(catalog, config.input.resize, config.input.resize_size)
    return catalog, {
        split.name: store.split(split) for split in (catalog.train, catalog.query, catalog.gallery) if split is not None
    }


def _fits(config: Config, catalog: Catalog) -> None:
    """What can only be checked once the training set is known."""
    slots = memory_size(config, len(catalog.train))
    if config.optim.max_iter and config.memory.memory_ratio > 0 and slots < config.optim.batch_size:
        raise UserError(
            f"--memory-ratio {config.memory.memory_ratio}: a memory of {slots} is smaller than a batch of {config.optim.batch_size}: "
            f"raise it, lower --batch-size, or pass --memory-ratio 0"
        )


def _folder(config: Config, fresh: bool) -> Path:
    """The run's folder, made. A fresh run is refused in a folder that holds one; without --output-dir a free name is found."""
    if config.run.output_dir:
        folder = Path(config.run.output_dir)
        if fresh and ((folder / "metrics.json").exists() or (folder / "checkpoints").exists()):
            raise UserError(f"{folder}: already holds a run: pass --resume to go on with it, or another --output-dir")
    else:
        folder = Path("outputs") / config.data.dataset / f"{config.method}-{config.model.model}"
    try:
        if config.run.output_dir:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = _new_folder(folder)
        (folder / ".writable").write_text("")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot write there ({error.strerror})") from error
    return folder


def _new_folder(stem: Path) -> Path:
    """stem-1, stem-2, …: the first that nobody has made, also not another process in the same moment."""
    for number in itertools.count(1):
        folder = stem.with_name(f"{stem.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def _write_config(folder: Path, config: Config) -> None:
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    tree = {"fastirt": __version__, "torch": torch.__version__, "job": job, "config": config.to_dict()}
    try:
        with replacing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / 'config.json'}: cannot be written ({error.strerror})") from error


def _report(metrics: dict[str, Any], config: Config, folder: Path) -> None:
    """Write metrics.json and print the table, published rows beside it."""
    write_metrics(folder / "metrics.json", metrics)
    print(table(metrics, config.data.dataset, config.method, config.model.model, config.recipe))
    log.info("wrote %s", folder / "metrics.json")
