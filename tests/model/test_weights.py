"""Weights from files: wrappings, heads left out, grids interpolated, refusals by name."""

import logging
import pickle

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from fastirt.config.options import ModelConfig
from fastirt.errors import UserError
from fastirt.model.build import build_encoder
from tests.helpers import TINY_MODEL, timm_model, tiny_kwargs

KWARGS = tiny_kwargs(depth=1)


def original(size=16, classes=5):
    torch.manual_seed(1)
    return timm_model(num_classes=classes, img_size=size, depth=1).state_dict()


def load(path, size=16):
    return build_encoder(ModelConfig(model=TINY_MODEL, model_kwargs=KWARGS, weights=str(path)), size).vit.state_dict()


@pytest.mark.parametrize("wrap", ["safetensors", "bare", "model", "state_dict", "module.", "half"])
def test_every_wrapping_loads_and_the_head_is_left_out_in_one_line(tmp_path, wrap, caplog):
    state = original()
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pth")
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "module.":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    elif wrap == "half":
        torch.save({name: value.half() for name, value in state.items()}, path)
    else:
        torch.save(state if wrap == "bare" else {wrap: state, "epoch": 3}, path)
    with caplog.at_level(logging.INFO, logger="fastirt"):
        loaded = load(path)
    assert [r.getMessage() for r in caplog.records] == [f"{path}: classifier left out: head.bias, head.weight"]
    for name, value in loaded.items():
        torch.testing.assert_close(value, state[name].half().float() if wrap == "half" else state[name], rtol=0, atol=0)


def test_position_embeddings_are_interpolated_as_timm_does(tmp_path):
    state = original(classes=0)
    torch.save(state, tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth", 32)
    expected = resample_abs_pos_embed(state["pos_embed"], [4, 4], [2, 2], num_prefix_tokens=1)
    torch.testing.assert_close(loaded["pos_embed"], expected)
    assert torch.equal(loaded["cls_token"], state["cls_token"])


def missing(s):
    s.pop("blocks.0.attn.qkv.weight")


def surplus(s):
    s["blocks.7.extra"] = torch.ones(1)


def misshapen(s):
    s["norm.weight"] = torch.ones(7)


def not_finite(s):
    s["norm.bias"][3] = float("nan")


def other_grid(s):
    s["pos_embed"] = torch.ones(1, 8, 48)


def other_width(s):
    s["pos_embed"] = torch.ones(1, 5, 64)


@pytest.mark.parametrize(
    "change, saying",
    [
        (missing, "missing blocks.0.attn.qkv.weight"),
        (surplus, "surplus blocks.7.extra"),
        (misshapen, "misshapen norm.weight (7,) instead of (48,)"),
        (not_finite, "non-finite norm.bias"),
        (other_grid, "pos_embed (1, 8, 48)"),
        (other_width, "pos_embed (1, 5, 64)"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, saying):
    state = original()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        load(tmp_path / "w.pth")
    assert saying in str(error.value)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "kind", ["missing", "pickle", "object", "text", "empty", "cut", "list", "cut.safetensors", "folder"]
)
def test_what_is_no_file_of_tensors_is_refused_without_running_it(tmp_path, kind, capsys):
    path = tmp_path / ("w.safetensors" if kind == "cut.safetensors" else "w.pth")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "object":
        torch.save({"model": Evil()}, path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "list":
        torch.save([torch.ones(1)], path)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("cut"):
        (save_file if kind == "cut.safetensors" else torch.save)(original(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
