"""The examples run as they are printed, and what `import fastirt` offers is there."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastirt
from fastirt.cli import main
from tests.helpers import TINY

EXAMPLES = Path(__file__).parents[2] / "scripts/examples"


def output_of(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_training_loop():
    metrics = eval(output_of("own_training_loop.py"))
    assert metrics["recall@1"] > 0.3  # chance: 0.03


@pytest.mark.slow
def test_search_a_folder(pictures, tmp_path):
    data = ["--dataset", "folder", "--data-path", str(pictures), "--rank", "1", "--output-dir", str(tmp_path / "run")]
    assert main(["train", *data, *TINY, "--method", "irt-l", "--max-iter", "1", "--batch-size", "8"]) == 0
    lines = output_of("search_a_folder.py", pictures, tmp_path / "run").splitlines()
    assert len([line for line in lines if line.count(".jpg (") == 3]) == 24


def test_everything_offered_is_there():
    assert all(getattr(fastirt, name) is not None for name in fastirt.__all__)
    assert set(fastirt.__all__) <= set(dir(fastirt)) and not hasattr(fastirt, "nothing")
