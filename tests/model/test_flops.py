"""Operations of a training step, and the peak of the machine that they are compared with."""

import pytest
import torch

from fastirt.config.options import ModelConfig
from fastirt.model.build import build_encoder
from fastirt.model.flops import peak_flops, training_flops


def test_operations_of_deit_small():
    """4.61 GMAC forward, two operations each, three times that for a step: 27.7 G; biases and norms
    are not counted."""
    encoder = build_encoder(ModelConfig(model="deit_small_patch16_224", weights="scratch"), 224)
    assert training_flops(encoder) == pytest.approx(27.6e9, rel=0.005)
    assert training_flops(encoder, momentum_encoder=True) * 3 == training_flops(encoder) * 4
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e9
