"""Runs the cases of a proof, each with nothing left of the one before."""

from __future__ import annotations

import json
import traceback
from typing import Callable, Mapping, Sequence

from benchmarks.fake_cuda import events
from benchmarks.fake_cuda.streams import lines_of
from fastirt.images import normalize


def print_faults(cases: Mapping[str, Callable[[], list[str]]], names: Sequence[str]) -> None:
    """Print a line of JSON for each case, or those of `names`: its name and its faults.

    An exception is a fault that names the project's lines.
    """
    for name in names or cases:
        normalize.byte_table.cache_clear(), normalize.whole_views.cache_clear()
        events.clear()
        try:
            faults = cases[name]()
        except Exception as error:
            place = lines_of(traceback.extract_tb(error.__traceback__))
            faults = [f"{type(error).__name__}: {str(error)[:600]} at {place}"]
        print(json.dumps([name, faults]), flush=True)
