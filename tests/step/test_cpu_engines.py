"""Engines of a CPU: what `--engine auto` takes, and oneDNN's linear layers."""

import copy

import pytest
import torch

from fastirt.distributed.ranks import Ranks
from fastirt.model import onednn_linear
from fastirt.model.build import build_encoder
from fastirt.step import engine as engines
from fastirt.step.engine import engine_of_run
from tests.helpers import read_config, tiny_config, train_few

needs_onednn = pytest.mark.skipif(not onednn_linear.is_available(), reason="needs oneDNN")


def test_auto_of_a_new_run_on_a_cpu_follows_its_length(monkeypatch):
    config = tiny_config(engine="auto", device="cpu")
    encoder = build_encoder(config.model, config.input.input_size)
    step = engines.training_flops(encoder) * config.optim.batch_size
    hour = int(engines.PAYS_COMPILING * torch.get_num_threads() / step) + 1
    minutes = int(engines.SHORT_RUN / step) + 1
    faster, compiles = [True], [True]
    monkeypatch.setattr(onednn_linear, "is_faster", lambda: faster[0])
    monkeypatch.setattr(engines, "_compiles", lambda: compiles[0])

    def found(steps, **changes):
        return engine_of_run(config.replace(max_iter=steps, **changes), encoder)

    assert [found(steps) for steps in (600, minutes, hour)] == ["auto", "onednn", "compile"]
    assert found(hour, engine="eager") == "eager" and found(minutes, precision="bf16") == "auto"
    assert found(hour, device="cuda:0") == "auto"
    compiles[0] = False
    assert found(hour) == "onednn"
    faster[0] = False
    assert found(hour) == "auto"
    assert engine_of_run(config.replace(max_iter=hour), encoder, Ranks(0, 2)) == "auto"


def test_no_compiler_is_no_error(monkeypatch):
    monkeypatch.setenv("CXX", "absent-compiler")
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    assert not engines._compiles()


def test_an_encoder_with_a_graph_break_is_not_compiled():
    class Breaks(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.sum().item() >= 0 else x

    assert engines._traces(torch.nn.Identity(), 8)
    assert not engines._traces(Breaks(), 8)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs, outputs", [(48, 144), (144, 48)])
def test_a_linear_layer_by_onednn_is_torchs_up_to_rounding(inputs, outputs, bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(inputs, outputs, bias=bias)
    ours = copy.deepcopy(plain)
    ours.__class__ = onednn_linear.OneDnnLinear
    results = []
    for layer in (plain, ours):
        x = torch.linspace(-1, 1, 6 * 5 * inputs).sin().view(5, 6, inputs).transpose(0, 1).requires_grad_()
        out = layer(x)
        out.cos().sum().backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert torch.equal(ours.eval()(x), plain(x))


@needs_onednn
def test_a_resumed_run_keeps_its_engine(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "SHORT_RUN", 0)
    monkeypatch.setattr(onednn_linear, "is_faster", lambda: True)
    assert train_few(image_folder, tmp_path, "--max-iter", "3") == 0
    assert read_config(tmp_path)["optim"]["engine"] == "onednn"
    monkeypatch.setattr(onednn_linear, "is_faster", lambda: False)
    assert train_few(image_folder, tmp_path, "--resume", tmp_path) == 0
    assert read_config(tmp_path)["optim"]["engine"] == "onednn"


def test_a_resumed_run_of_an_earlier_version_stays_eager(image_folder, tmp_path, monkeypatch):
    """Its config.json says "auto", which was eager on a CPU."""
    monkeypatch.setattr(onednn_linear, "is_faster", lambda: True)
    assert train_few(image_folder, tmp_path, "--max-iter", "3") == 0
    assert read_config(tmp_path)["optim"]["engine"] == "auto"
    monkeypatch.setattr(engines, "SHORT_RUN", 0)
    assert train_few(image_folder, tmp_path, "--resume", tmp_path) == 0
    assert read_config(tmp_path)["optim"]["engine"] == "auto"
