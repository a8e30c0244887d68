"""Optimisers: apex's where it is, its absence in one line, and what a checkpoint keeps of them."""

import sys
import types

import pytest
import torch

from fastirt.errors import UserError
from fastirt.model.build import build_encoder
from fastirt.step import optimizer as optim
from fastirt.step.optimizer import build_optimizer, load_optimizer, optimizer_state, set_learning_rate
from tests.helpers import last_line, make_batch, make_step, needs_gpu, tiny_config, train_tiny


@pytest.fixture
def vit():
    config = tiny_config()
    return build_encoder(config.model, 16).vit


@pytest.mark.parametrize("opt", ["apex-fused-adam", "apex-fused-lamb"])
def test_without_apex_the_error_says_how_to_build_it(opt, capsys, tmp_path, image_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)  # also where it is installed
    assert train_tiny(image_folder, tmp_path / "run", "--batch-size", "8", "--rank", "1", "--opt", opt) == 2
    error = last_line(capsys)
    assert f"--opt {opt}: needs NVIDIA apex" in error
    assert "pip install" in error


def test_apex_s_absence_is_the_same_for_the_other_package_of_that_name(vit, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(UserError, match="not on PyPI"):
        build_optimizer(vit, tiny_config(opt="apex-fused-adam").optim)


def test_apex_on_a_cpu_is_refused(vit, monkeypatch):
    apex = types.ModuleType("apex")
    apex.optimizers = types.ModuleType("apex.optimizers")
    monkeypatch.setitem(sys.modules, "apex", apex)
    with pytest.raises(UserError, match="runs on a GPU only"):
        build_optimizer(vit, tiny_config(opt="apex-fused-lamb").optim)


@needs_gpu
@pytest.mark.parametrize("opt, plain", [("apex-fused-adam", "adamw"), ("apex-fused-lamb", "lamb")])
def test_apex_has_the_same_groups_and_trains_alike(opt, plain):
    pytest.importorskip("apex.optimizers")
    steps = [make_step(tiny_config(opt=name, engine="eager"), device="cuda") for name in (opt, plain)]
    groups = [[(g["weight_decay"], len(g["params"])) for g in step.optimizer.param_groups] for step in steps]
    assert groups[0] == groups[1]
    for number in range(5):
        for step in steps:
            step(make_batch(number, device="cuda"))
    if plain == "adamw":
        for ours, theirs in zip(*(step.networks.weights for step in steps)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_keeps_nothing_of_the_engine(vit):
    """The rate may be a tensor on a GPU in one engine and a number in the other; each keeps its
    own."""
    first, second = (build_optimizer(vit, tiny_config(lr=rate).optim) for rate in (0.5, 0.25))
    for weight in vit.parameters():
        weight.grad = torch.ones_like(weight)
    first.step()
    state = optimizer_state(first)
    assert not set(optim.ENGINE_KEYS) & set(state["param_groups"][0])
    for group in second.param_groups:
        group["lr"] = torch.tensor(0.25)
    load_optimizer(second, state)
    assert all(isinstance(group["lr"], torch.Tensor) and group["fused"] for group in second.param_groups)
    rate = second.param_groups[0]["lr"]
    set_learning_rate(second, 0.125)
    assert rate is second.param_groups[0]["lr"] and rate == 0.125
    weight = next(iter(second.state))
    assert torch.equal(second.state[weight]["exp_avg"], first.state[weight]["exp_avg"])


def test_what_a_graph_can_hold():
    assert all(map(optim.capturable, ("adamw", "AdamW", "sgd", "apex-fused-adam")))
    assert not any(map(optim.capturable, ("lamb", "lookahead_adamw", "apex-fused-lamb")))


def test_a_close_name_is_offered(vit):
    with pytest.raises(UserError, match="apex-fused-adam"):
        build_optimizer(vit, tiny_config(opt="apex-fused-adamw").optim)
