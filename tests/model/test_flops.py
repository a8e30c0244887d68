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


def test_the_peak_is_the_data_sheets_or_unknown(monkeypatch):
    """A CPU's was timed once, and a run reported 123 % of it."""
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    gpu = torch.device("cuda:0")
    for name, bf16, fp32 in (("NVIDIA H200", 989e12, 67e12), ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, torch.bfloat16) == bf16 and peak_flops(gpu, torch.float32) == fp32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert peak_flops(gpu, torch.bfloat16) is None
