"""SWEEP.yaml: which flags are tried with which values, and how the settings are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

from fastirt.config.option_values import option_name, option_types, option_value, similar_names
from fastirt.config.run_file import flags_of_tree, read_run_file, read_yaml
from fastirt.errors import UserError

REMEDY = "a sweep file has the keys base (flags) and sweep (flag: [values]); see fastirt/tuning/README.md"
KEYS = ("base", "sweep", "method", "runs", "seed", "seeds", "validation", "metric", "output_dir", "keep_models")
RANGE_KEYS = ("min", "max", "log")
# Flags that the sweep itself sets, and what to write instead.
OWN = {
    "output_dir": "each run gets its own folder: write output_dir at the top of the file",
    "resume": "a sweep goes on by itself: leave it out",
    "per_query": "leave it out",
    "seed": "write `seeds: [0, 1, 2]` at the top of the file, without a seed in base",
    "eval_split": "a sweep is measured on validation classes of the training set: leave it out",
}
# Flags that all runs share.
SHARED = {"dataset", "data_path", "packed", "device", "rank", "tracker", "log_dir"}
METRICS = re.compile(
    r"(?P<at>recall|precision|mp|map)@(?P<k>\d+)|map@r|r_precision|map|map_trapezoid|mrr|minp|median_rank"
)


@dataclass(frozen=True)
class Range:
    """Values of a flag that a random sweep draws from, both ends included."""

    low: float
    high: float
    log: bool
    whole: bool  # an int option


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked."""

    path: Path
    base: dict[str, Any]  # flags of every run, by option name
    space: dict[str, tuple[Any, ...] | Range]  # flags that are tried
    method: str = "grid"
    runs: Optional[int] = None  # settings of a random sweep
    seed: int = 0  # of the draws and of the validation classes
    seeds: tuple[int, ...] = (0,)  # of the runs of each setting
    validation: float = 0.2  # share of the training classes
    metric: str = "recall@1"
    output_dir: Optional[str] = None
    keep_models: bool = False

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "median_rank"


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises UserError that names file, key and remedy."""
    tree = read_yaml(path, REMEDY)
    for key in tree:
        if key not in KEYS:
            similar = similar_names(str(key), KEYS)
            is_option = str(key).replace("-", "_") in option_types()
            remedy = "flags go into base or sweep" if is_option else f"the keys are {', '.join(KEYS)}"
            raise UserError(f"{path}: {key}: no such key{f'; did you mean {similar}?' if similar else ''}: {remedy}")
    method = _choice(tree.get("method", "grid"), f"{path}: method", ("grid", "random"))
    base = _base(tree.get("base", {}), path)
    own_seed = base.pop("seed", None)
    if own_seed is not None and "seeds" in tree and not isinstance(tree["base"], str):
        raise UserError(f"{path}: base.seed: {OWN['seed']}")
    space = _space(tree.get("sweep"), path, method)
    return Sweep(
        path,
        base,
        space,
        method,
        _runs(tree, path, method),
        _whole(tree.get("seed", 0), f"{path}: seed", 0),
        _seeds(tree.get("seeds", [own_seed or 0]), path),
        _validation(tree.get("validation", 0.2), path),
        _metric(tree.get("metric", "recall@1"), path),
        _output_dir(tree.get("output_dir"), path),
        _flag(tree.get("keep_models", False), f"{path}: keep_models"),
    )


def _base(tree: Any, path: Path) -> dict[str, Any]:
    if isinstance(tree, str):  # a run file beside the sweep file
        flags = read_run_file(path.parent / tree)
    elif isinstance(tree, dict) or tree is None:
        flags = flags_of_tree(tree or {}, f"{path}: base.")
    else:
        raise UserError(f"{path}: base: must be flags such as `lr: 1e-4`, or the name of a run file")
    for name in sorted(flags.keys() & OWN.keys() - {"seed"}) if not isinstance(tree, str) else ():
        raise UserError(f"{path}: base.{name}: {OWN[name]}")
    return {name: value for name, value in flags.items() if name not in OWN or name == "seed"}


def _space(tree: Any, path: Path, method: str) -> dict[str, tuple[Any, ...] | Range]:
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: sweep: names no flag: write flags with the values to try, such as `lr: [1e-5, 1e-4]`")
    space: dict[str, tuple[Any, ...] | Range] = {}
    for key, value in tree.items():
        place = f"{path}: sweep.{key}"
        name = option_name(key, place, OWN)
        if name in OWN or name in SHARED:
            raise UserError(f"{place}: {OWN.get(name, 'all runs share it: write it into base')}")
        if name in space:
            raise UserError(f"{place}: {name} is given twice: keep one of them")
        if isinstance(value, dict):
            space[name] = _range(name, value, place, method)
            continue
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"{place}: an empty list: write the values to try")
        # one after the other: 1 and true are equal
        parsed = [option_value(name, item, f"{place}: value {number}") for number, item in enumerate(values, 1)]
        if twice := next((item for number, item in enumerate(parsed) if item in parsed[:number]), None):
            raise UserError(f"{place}: {twice!r} is listed twice: keep one of them")
        space[name] = tuple(parsed)
    return space


def _range(name: str, tree: dict[Any, Any], place: str, method: str) -> Range:
    of = option_types()[name]
    if of.is_list or of.kind not in (int, float):
        raise UserError(f"{place}: min and max are for numbers: write a list of values to try")
    if method != "random":
        raise UserError(f"{place}: min and max need `method: random`: write a list of values, or that line")
    for key in tree:
        if key not in RANGE_KEYS:
            raise UserError(f"{place}.{key}: no such key: a range has {', '.join(RANGE_KEYS)}")
    for key in ("min", "max"):
        if key not in tree:
            raise UserError(f"{place}: a range needs {key}: write {{min: …, max: …}}, and log: true for large ones")
    low, high = (option_value(name, tree[key], f"{place}.{key}") for key in ("min", "max"))
    log = _flag(tree.get("log", False), f"{place}.log")
    if low is None or high is None or not low < high:
        raise UserError(f"{place}: min ({tree['min']}) must be below max ({tree['max']})")
    if log and low <= 0:
        raise UserError(f"{place}.min: {low} has no logarithm: with log: true it must be above 0")
    return Range(low, high, log, of.kind is int)


def _runs(tree: dict[Any, Any], path: Path, method: str) -> Optional[int]:
    if method == "grid":
        if tree.get("runs") is not None:
            raise UserError(f"{path}: runs: a grid tries every setting: leave it out, or write `method: random`")
        return None
    if tree.get("runs") is None:
        raise UserError(f"{path}: runs: missing: a random sweep needs the number of settings, such as `runs: 20`")
    return _whole(tree["runs"], f"{path}: runs", 1)


def _seeds(value: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: seeds: must be a list such as [0, 1, 2]")
    seeds = tuple(_whole(seed, f"{path}: seeds", 0) for seed in value)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: one is listed twice: keep one of them")
    return seeds


def _validation(value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise UserError(f"{path}: validation: must be the share of training classes, between 0 and 1, not {value!r}")
    return float(value)


def _metric(value: Any, path: Path) -> str:
    if not isinstance(value, str) or METRICS.fullmatch(value) is None:
        raise UserError(f"{path}: metric: {value!r} is no metric: use recall@1, map@r, r_precision, map, mrr, …")
    return value


def check_measured(metric: str, ks: Sequence[int], path: Path) -> None:
    """Raises UserError for a metric at a K that `--rank` does not name."""
    found = METRICS.fullmatch(metric)
    if found is not None and found["k"] and int(found["k"]) not in ks:
        shown = " ".join(map(str, ks))
        raise UserError(f"{path}: metric: {metric} is not measured: base.rank is {shown}: add {found['k']} there")


def _output_dir(value: Any, path: Path) -> Optional[str]:
    return None if value is None else option_value("output_dir", value, f"{path}: output_dir")


def _whole(value: Any, place: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{place}: must be a whole number of at least {least}, not {value!r}")
    return value


def _flag(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{place}: must be true or false, not {value!r}")
    return value


def _choice(value: Any, place: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        training = "; the method of training goes into base" if value in ("irt-o", "irt-l", "irt-r") else ""
        raise UserError(f"{place}: must be {' or '.join(choices)}, not {value!r}{training}")
    return str(value)
