"""The settings of a sweep: all of a grid, or random ones."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any, Iterator

import numpy as np

from fastirt.config.random_streams import Purpose, stream
from fastirt.tuning.sweep_file import Range, Sweep

log = logging.getLogger("fastirt")

DIGITS = 4  # of a drawn number: a command line stays readable

Setting = dict[str, Any]  # option name to value


def settings(sweep: Sweep) -> list[Setting]:
    """In the order of the file, or as drawn; none is there twice.

    A larger `runs` keeps the settings of a smaller one.
    """
    if sweep.method == "grid":
        lists = [values for values in sweep.space.values() if isinstance(values, tuple)]
        return [dict(zip(sweep.space, values)) for values in itertools.product(*lists)]
    assert sweep.runs is not None
    found: list[Setting] = []
    for setting in itertools.islice(_draws(sweep), 100 * sweep.runs):
        if setting not in found:
            found.append(setting)
        if len(found) == sweep.runs:
            break
    if len(found) < sweep.runs:
        log.warning("%s: runs: %d asked for, only %d different settings exist", sweep.path, sweep.runs, len(found))
    return found


def _draws(sweep: Sweep) -> Iterator[Setting]:
    for number in itertools.count():
        random = stream(sweep.seed, Purpose.SETTINGS, number)
        yield {name: _draw(values, random) for name, values in sweep.space.items()}


def _draw(values: tuple[Any, ...] | Range, random: np.random.Generator) -> Any:
    if isinstance(values, tuple):
        return values[int(random.integers(len(values)))]
    if values.whole and not values.log:
        return int(random.integers(int(values.low), int(values.high) + 1))
    if values.log:
        drawn = math.exp(random.uniform(math.log(values.low), math.log(values.high)))
    else:
        drawn = random.uniform(values.low, values.high)
    drawn = round(drawn) if values.whole else float(f"{drawn:.{DIGITS}g}")
    return min(max(drawn, values.low), values.high)
