"""Runs a module of this folder in a process of its own, for the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here: the fake one would hide it")


def on_fake_gpu(module: str, *arguments: str, device: str = "H200", timeout: float = 240) -> list[Any]:
    """The JSON lines that a module prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"FAKE_DEVICE": device, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.fake_cuda.run", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def selected(request: pytest.FixtureRequest, name: str) -> list[str]:
    """The values of a parameter in the tests of this module that were selected."""
    items = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params[name] for item in items if hasattr(item, "callspec") and name in item.callspec.params]
