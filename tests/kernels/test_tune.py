"""The tuner: tiles that differ, and rows for the table."""

import sys

import pytest
import torch

from fastirt.kernels import tune
from fastirt.kernels.variants.tile_table import Tile, TileRow


def test_the_tuner_prints_rows_of_the_table():
    tile = Tile(64, 32, 128, 8, 3, grad_chunks=3, skip_inactive=True, waves=2, source="NVIDIA H100")
    line = tune.row("grad", 90, "bf16", "fp32", 384, 64, tile, "NVIDIA H100")
    assert line.startswith('TileRow("grad", (90,), "bf16", ("fp32",), 384, 64, Tile(64, 32, 128, 8, 3, ')
    assert eval(line.removesuffix(",")) == TileRow("grad", (90,), "bf16", ("fp32",), 384, 64, tile)


@pytest.mark.parametrize("kind", ["stats", "grad"])
def test_the_tuner_s_tiles_are_few_and_differ(kind):
    tiles = list(tune.candidates(kind, "bf16", "bf16", 384, 227 * 1024))
    assert 20 < len(tiles) == len(set(tiles)) < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_tuner_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune"])
    assert tune.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a GPU" in line
