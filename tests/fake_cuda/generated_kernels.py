"""Compiles the Triton kernels that TorchInductor generates, for the fake GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Iterable
from unittest import mock

import triton
from torch._inductor import config as inductor_config
from torch._inductor.runtime import triton_helpers

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def distinct(sources: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(name, source) pairs without those that equal an earlier one but for their names."""
    kept: dict[str, tuple[str, str]] = {}
    for name, source in sources:
        kept.setdefault(re.sub(r"triton_\w+", "", source), (name, source))
    return dict(kept.values())


def spilling(sources: dict[str, str]) -> list[str]:
    """Kernels that keep values in local memory, in any configuration that their autotuner tries.

    Local memory is read off the finished program. Configurations that the autotuner derives from
    the registers of a loaded program are not tried.
    """
    faults = []
    with (
        tempfile.TemporaryDirectory() as folder,
        inductor_config.patch(use_static_triton_launcher=False, force_disable_caches=True),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),  # the true driver needs libcuda
    ):
        for name, source in sources.items():
            kernel = _loaded(name, source, Path(folder))
            for config in kernel.configs:
                made = kernel._precompile_config(config).kernel
                arch = made.metadata.target.arch
                if arch != triton.runtime.driver.active.get_current_target().arch:
                    faults.append(f"{name} is compiled for sm_{arch}")
                used = _resources(made.asm["cubin"], Path(folder))
                if used["STACK"] or used["LOCAL"]:
                    faults.append(f"{name} with {config} spills: {used['STACK'] + used['LOCAL']} bytes a thread")
    return faults


def _loaded(name: str, source: str, folder: Path) -> Any:
    # Triton reads the source from its file.
    path = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _resources(program: bytes, folder: Path) -> dict[str, int]:
    """REG (a thread), STACK and LOCAL (bytes a thread) and others, as cuobjdump prints them."""
    path = folder / "program.cubin"
    path.write_bytes(program)
    said = subprocess.run([str(CUOBJDUMP), "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}
