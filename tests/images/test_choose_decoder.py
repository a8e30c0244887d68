"""Which decoder a run takes, and what a run's folder says of it."""

import logging

import pytest
import torch

from fastirt.config.options import Config
from fastirt.errors import UserError
from fastirt.images.decoders import choose
from fastirt.images.decoders.choose import choose_loader
from fastirt.loading.image_reader import ImageDecoder
from fastirt.run_config import finalized
from tests.helpers import CPU, last_line, needs_dali, read_config, run_cli, tiny_input, train_tiny

CUDA = torch.device("cuda:0")


def missing(*names):
    """The checks of the decoders, of which `names` fail."""

    def check(name):
        if name in names:
            raise ImportError(f"No module named {name}")

    return {name: (lambda name=name: check(name)) for name in choose.CHECKS}


@pytest.mark.parametrize(
    "device, gone, chosen",
    [
        (CPU, (), "torchvision"),
        (CUDA, (), "dali"),
        (CPU, ("torchvision",), "dali"),
        (CUDA, ("dali",), "torchvision"),
        (CPU, ("torchvision", "dali"), "pil"),
    ],
)
def test_auto_is_the_fastest_that_works(monkeypatch, caplog, device, gone, chosen):
    caplog.set_level(logging.INFO, "fastirt")
    monkeypatch.setattr(choose, "CHECKS", missing(*gone))
    assert choose_loader("auto", device) == chosen
    lines = [record.message for record in caplog.records]
    assert len(lines) == len(gone)
    assert all(f"No module named {name}" in line for name, line in zip(gone, lines))
    assert choose_loader(chosen, device) == chosen
    for name in gone:
        with pytest.raises(UserError, match=f"--loader {name}: .*No module named {name}"):
            choose_loader(name, device)


def test_torchvision_without_its_extension_is_noticed(monkeypatch):
    def fail(*_):
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", fail)
    assert choose_loader("auto", CPU) != "torchvision"


@pytest.mark.parametrize("name", ["torchvision", "pil", pytest.param("dali", marks=needs_dali)])
def test_the_choice_is_written_down(name):
    assert finalized(Config().replace(loader=name), CPU).input.loader == name
    assert finalized(Config().replace(loader="auto"), CPU).input.loader == "torchvision"
    decoder = ImageDecoder(tiny_input(loader=name), 1, 1, CPU)
    decoder.open()
    assert type(decoder._decoder).__name__.lower().startswith(name)
    decoder.close()


def test_a_run_goes_on_with_its_decoder(image_folder, tmp_path, capsys):
    """`config.json` names it, and --resume keeps it where the default would be another."""
    few = "--max-iter 1 --batch-size 8 --rank 1 --save-freq 1 --loader pil".split()
    assert train_tiny(image_folder, tmp_path, *few) == 0
    assert run_cli("train", "--resume", tmp_path, "--max-iter", "2") == 0
    assert read_config(tmp_path)["input"]["loader"] == "pil"
    assert run_cli("train", "--resume", tmp_path, "--max-iter", "3", "--loader", "auto") != 0
    assert "loader: 'pil', 'torchvision'" in last_line(capsys)
