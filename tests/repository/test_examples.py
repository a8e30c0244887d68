"""The examples run as they are printed, and what `import fastirt` offers is there."""

import re
import subprocess
import sys

import pytest

import fastirt
from fastirt.config.user_code import load_object
from tests.helpers import ROOT


def output_of(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts/examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_training_loop():
    metrics = eval(output_of("own_training_loop.py"))
    assert metrics["recall@1"] > 0.3  # chance: 0.03


@pytest.mark.slow
def test_search_a_folder(image_folder, finished_run):
    lines = output_of("search_a_folder.py", image_folder, finished_run).splitlines()
    assert len([line for line in lines if line.count(".jpg (") == 3]) == 24


@pytest.mark.parametrize("name", ["own_data_set", "own_augmentation", "own_loss"])
def test_an_own_part_has_the_name_that_its_command_gives(name):
    """tests/training/test_own_parts.py trains with them."""
    source = (ROOT / f"scripts/examples/{name}.py").read_text()
    text = re.search(r"scripts/examples/\w+\.py:\w+", source).group()
    assert text in (ROOT / "fastirt/README.md").read_text()
    assert callable(load_object("--flag", str(ROOT / text)))


def test_everything_offered_is_there():
    assert all(getattr(fastirt, name) is not None for name in fastirt.__all__)
    assert set(fastirt.__all__) <= set(dir(fastirt))
    assert not hasattr(fastirt, "nothing")
