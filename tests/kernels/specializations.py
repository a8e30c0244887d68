"""Counts the kernels that the tests in gpu_check's stages compile on an H200; writes the counts.

    python -m tests.kernels.specializations        about three minutes: the tests run interpreted

A test compiles a kernel once for each set of constants and types. Processes that share the tests
compile side by side, some of them the same kernel, so what counts is the most that one compiles.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from fastirt.kernels import gather
from fastirt.kernels.counts import similarities
from fastirt.kernels.passes import launch
from fastirt.kernels.variants.tile_table import lookup

FILE = Path(__file__).with_suffix(".json")
# As in gpu_check.sh, but for the tests of other folders.
TESTS = ["tests/kernels", "--ignore", "tests/kernels/test_aot.py", "--ignore", "tests/kernels/test_gates.py"]
STAGES = {
    "smoke": ["-k", "cuda_graph or no_wait or page_locked or without_a_memory or a_captured_step or up_to_the_error"],
    "kernels": ["-k", "test_values or test_gather or test_parts"],
}
PROCESSES = 16
OF_THE_TILE = ("BM", "BN", "BD", "CHUNKS", "GRAD_CHUNKS", "SKIP_INACTIVE", "num_warps", "num_stages")


class Recorder:
    """pytest's plugin: the kernels of each test, in the order of the tests."""

    def __init__(self) -> None:
        self.kernels: dict[str, set[str]] = {}
        self.current: set[str] = set()
        self.tile: Any = None
        plan = launch.plan

        def planned(kind, precision, columns, rows, batch, memory, dim, device, tile=None):
            self.tile = tile or lookup(kind, 90, precision, columns, dim, rows)
            return plan(kind, precision, columns, rows, batch, memory, dim, device, tile)

        launch.plan = planned
        objective = ("stats", "rows", "totals", "grad", "combine")
        for module, names in ((launch, objective), (gather, ("gather",)), (similarities, ("count",))):
            for name in names:
                setattr(module, f"{name}_kernel", Recorded(self, name, getattr(module, f"{name}_kernel")))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.current = self.kernels.setdefault(item.nodeid, set())


class Recorded:
    """A kernel that notes how it is launched."""

    def __init__(self, recorder: Recorder, name: str, kernel: Any) -> None:
        self.recorder, self.name, self.kernel = recorder, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            types = [str(a.dtype) for a in arguments if isinstance(a, torch.Tensor)]
            kept = {name: value for name, value in constants.items() if name not in OF_THE_TILE}
            tile = self.recorder.tile if self.name in ("stats", "grad") else None
            few = self.name == "combine" and arguments[2].shape[0] <= 512  # has constants of its own
            self.recorder.current.add(f"{self.name} {types} {sorted(kept.items())} {tile} {few}")
            return self.kernel[grid](*arguments, **constants)

        return run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


class Selected:
    """pytest's plugin: the names of the tests that are selected."""

    names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.nodeid for item in session.items]


def counts(kernels: list[set[str]]) -> dict[str, int]:
    parts = [set().union(*kernels[part::PROCESSES]) for part in range(PROCESSES)]
    return {"specializations": len(set().union(*kernels)), "most_of_one_process": max(map(len, parts))}


def main() -> int:
    recorder = Recorder()
    code = pytest.main([*TESTS, "-p", "no:cacheprovider"], plugins=[recorder])
    if code:
        return int(code)

    found = {}
    for stage, flags in STAGES.items():
        selected = Selected()
        pytest.main([*TESTS, *flags, "--collect-only"], plugins=[selected])
        found[stage] = counts([recorder.kernels[name] for name in selected.names])
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
