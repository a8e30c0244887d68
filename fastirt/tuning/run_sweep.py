"""The runs of a sweep, one after the other in this process; each keeps its result in its folder."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch

from fastirt.atomic import try_lock
from fastirt.commands import train
from fastirt.config.options import Config
from fastirt.config.presets import resolve
from fastirt.config.run_file import below
from fastirt.config.run_files import RunFiles
from fastirt.config.user_code import portable, with_digest
from fastirt.datasets.digest import catalog_digest
from fastirt.distributed.ranks import Ranks
from fastirt.errors import OS_ERRNOS, UserError, first_line, user_message
from fastirt.pages.sweep_page import write_sweep_page
from fastirt.retrieval.report import read_metrics
from fastirt.training import checkpoint
from fastirt.tuning.held_out import HeldOut
from fastirt.tuning.results import (
    RunResult,
    SettingResult,
    best_of,
    command_line,
    label,
    sweep_page,
    table,
    write_results,
    write_text,
)
from fastirt.tuning.settings import Setting, settings
from fastirt.tuning.sweep_file import Sweep, check_measured, read_sweep

log = logging.getLogger("fastirt")

RESULT = "result.json"  # in the folder of a run that has ended


def run_sweep(path: Path, output_dir: str | None, ranks: Ranks, retry_failed: bool = False) -> int:
    """`fastirt sweep`: returns the exit code.

    Args:
        path: the sweep file.
        output_dir: of the results; None: as the file says, or outputs/sweeps/NAME.
        ranks: must be one.
        retry_failed: run failed settings again.

    Raises:
        UserError: the file is malformed, the data set cannot be read or has too few classes, or no
            setting finished.
    """
    if ranks.is_distributed:
        raise ranks.shared_error(
            "sweep runs in one process: start it without torchrun, several in folders of their own"
        )
    sweep = read_sweep(path)
    out = Path(os.path.abspath(os.path.expanduser(output_dir or sweep.output_dir or f"outputs/sweeps/{path.stem}")))
    tried = settings(sweep)
    config = resolve(below(sweep.base, tried[0]))
    check_measured(sweep.metric, config.eval.rank, path)
    held_out = HeldOut(config, sweep.validation, sweep.seed)
    with _locked(out):
        code, results = _Runs(sweep, out, held_out, ranks, retry_failed).run(tried)
    if code:
        log.warning("stopped: the same command goes on with the runs that are missing")
        return code
    print(table(sweep, results))
    best = best_of(sweep, results)
    if best is None:
        failed = next((result.error for result in results if result.error), "no metric")
        raise UserError(f"{path}: none of {len(results)} settings finished; the first failed so: {failed}")
    print(f"\nResults: {out}/sweep.json, sweep.csv and sweep.html")
    print(f"The best setting on the whole training set:\n{command_line(sweep, best.setting)}")
    return 0


class _Runs:
    """Runs the settings and writes the results after each run."""

    def __init__(self, sweep: Sweep, out: Path, held_out: HeldOut, ranks: Ranks, retry_failed: bool) -> None:
        self.sweep, self.out, self.held_out, self.ranks = sweep, out, held_out, ranks
        self.retry_failed = retry_failed
        self.digest = catalog_digest(held_out.catalog)
        labels = {split.name: split.labels for split in held_out.catalog.splits()}
        self.facts = {
            "classes": {name: len(set(of.tolist())) for name, of in labels.items()},
            "images": {name: len(of) for name, of in labels.items()},
        }
        log.info(
            "sweep: trains on %d classes (%d images) of %s, validates on %d others (%d); its test images stay unread",
            self.facts["classes"]["train"],
            self.facts["images"]["train"],
            held_out.full.place,
            self.facts["classes"]["val"],
            self.facts["images"]["val"],
        )

    def run(self, tried: Sequence[Setting]) -> tuple[int, list[SettingResult]]:
        """(exit code: 128 + signal where one stopped it, results in the order of `tried`)."""
        results = [
            SettingResult(setting, [RunResult(seed, self._folder(setting, seed)) for seed in self.sweep.seeds])
            for setting in tried
        ]
        todo = [(result, run) for result in _by_preprocessing(self.sweep, results) for run in result.runs]
        for _, run in todo:
            self._read(run)
        done = sum(run.status != "waiting" for _, run in todo)
        if done:
            log.info("sweep: %d of %d runs are done already", done, len(todo))
        self._write(results)
        for number, (result, run) in enumerate(todo, 1):
            if run.status != "waiting":
                continue
            shown = " ".join(label(name, value) for name, value in result.setting.items())
            log.info("sweep: run %d of %d: %s --seed %d", number, len(todo), shown, run.seed)
            if code := self._run(result.setting, run):
                return code, results
            self._write(results)
        return 0, results

    def _run(self, setting: Setting, run: RunResult) -> int:
        """Fill in the result of one run; returns the exit code where a signal stopped it."""
        folder, start = self.out / run.folder, time.monotonic()
        flags = {**below(self.sweep.base, setting), "seed": run.seed, "output_dir": str(folder)}
        if checkpoint.latest(folder) is not None:
            flags["resume"] = ""
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its first checkpoint
        try:
            if code := train(flags, self.ranks, shared=self.held_out.shared):
                return code
            run.metrics = read_metrics(folder)
            if self.sweep.metric not in run.metrics:
                raise UserError(f"{self.sweep.metric} was not measured: {', '.join(run.metrics)} were")
            run.status = "finished"
        except Exception as error:  # whatever one setting does, the others go on
            if isinstance(error, OSError) and error.errno in OS_ERRNOS:
                raise  # a full disk fails them all
            message = user_message(error)
            run.status, run.error = "failed", message or f"{type(error).__name__}: {first_line(error)}"
            log.warning("sweep: failed: %s", run.error, exc_info=None if message else error)
        run.seconds = round(time.monotonic() - start, 3)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: vars(run)[name] for name in ("status", "metrics", "error", "seconds")}
        write_text(folder / RESULT, json.dumps({**kept, "flags": setting, "seed": run.seed}, indent=1) + "\n")
        self._clean(RunFiles(folder))
        gc.collect()  # the model of the run before would stay beside the next one's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return 0

    def _clean(self, files: RunFiles) -> None:
        """Delete what only a run that goes on needs."""
        shutil.rmtree(files.checkpoints, ignore_errors=True)
        if not self.sweep.keep_models:
            for file in (files.final_model, files.best_model):
                file.unlink(missing_ok=True)

    def _folder(self, setting: Setting, seed: int) -> str:
        """runs/NAME-DIGEST: another one for other flags, seed, images or code of the user."""
        flags = below(self.sweep.base, setting)
        key = [sorted(flags.items()), seed, self.sweep.validation, self.digest, *_own_code(flags)]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]
        words = [f"{name}={value}" for name, value in setting.items()] + [f"seed={seed}"]
        name = "".join(c if c.isalnum() or c in "=.-+" else "_" for c in ",".join(words))
        return f"runs/{name[:80]}-{digest}"

    def _read(self, run: RunResult) -> None:
        """The result of an earlier call, if there is one."""
        try:
            stored = json.loads((self.out / run.folder / RESULT).read_text(encoding="utf-8"))
            known = RunResult(run.seed, run.folder, *(stored[n] for n in ("status", "metrics", "error", "seconds")))
        except (OSError, ValueError, KeyError, TypeError):
            return
        is_whole = known.status == "finished" and self.sweep.metric in known.metrics
        if is_whole or (known.status == "failed" and not self.retry_failed):
            vars(run).update(vars(known))
            self._clean(RunFiles(self.out / run.folder))  # killed before it did so

    def _write(self, results: Sequence[SettingResult]) -> None:
        write_results(self.sweep, results, self.facts, self.out)
        write_sweep_page(self.out / "sweep.html", sweep_page(self.sweep, results, self.facts))


def _own_code(flags: dict[str, Any]) -> list[str | None]:
    """The user's functions by name and digest: results of a file that has changed are not its."""
    found = []
    for name in ("augment", "objective"):
        if flags.get(name) is not None:
            try:
                found.append(portable(with_digest(f"--{name}", flags[name])))
            except UserError:  # its run says so
                continue
    return found


def _by_preprocessing(sweep: Sweep, results: Sequence[SettingResult]) -> list[SettingResult]:
    """Settings with equal preprocessing one after the other: they share decoded images."""
    groups: dict[Any, list[SettingResult]] = {}
    for result in results:
        try:
            config: Config | None = resolve(below(sweep.base, result.setting))
        except UserError:  # its run says so
            config = None
        groups.setdefault(config and (config.input, config.data.packed), []).append(result)
    return [result for group in groups.values() for result in group]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder of results. Raises UserError where another sweep does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "w") as file:
            if not try_lock(file):
                raise UserError(f"{out}: another sweep writes there: wait for it, or choose another --output-dir")
            yield
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot write there ({error.strerror or error})") from error
