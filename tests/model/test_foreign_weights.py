"""Weights of others: wrappings, files of several models, official checkpoints, misfits."""

import logging
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fastirt.config.options import ModelConfig
from fastirt.errors import UserError
from fastirt.model.build import build_encoder
from tests.helpers import DECODER, TINY_MODEL, TINY_TIMM, folder_flags, run_cli, timm_model

KWARGS = {**TINY_TIMM, "depth": 1}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return timm_model(num_classes=5, depth=1).state_dict()


def load(path, model=TINY_MODEL, kwargs=KWARGS, size=16):
    arguments = tuple(f"{name}={value}" for name, value in kwargs.items())
    return build_encoder(ModelConfig(model=model, model_kwargs=arguments, weights=str(path)), size).vit.state_dict()


def assert_is(loaded, state, shift=0.0):
    for name, value in loaded.items():
        torch.testing.assert_close(value, state[name] + shift, rtol=0, atol=0, msg=name)


def under(prefix, state, shift=0.0):
    return {prefix + name: value + shift for name, value in state.items()}


WRAPPINGS = {
    "compiled": lambda s: under("_orig_mod.", s),
    "ddp of compiled": lambda s: under("module._orig_mod.", s),
    "encoder": lambda s: under("encoder.", s),
    "backbone": lambda s: {"teacher": under("backbone.", s)},
    "lightning": lambda s: {"state_dict": under("model.", s), "hyper_parameters": {"lr": 1}},
    "imagenet": lambda s: {"state_dict": under("module.", s), "epoch": 3, "arch": "x", "best": 1.0},
    "arguments": lambda s: {"model": s, "optimizer": {}, "args": Namespace(lr=1e-3, out="x")},
    "numpy scalar": lambda s: {"model": s, "best": np.float64(3.5)},
    "beside a number": lambda s: {**s, "epoch": 3},
    "any key": lambda s: {"net": s},
    "only averaged": lambda s: {"model_ema": s},
    "timm's training": lambda s: {"state_dict": under("", s, 1), "state_dict_ema": s, "optimizer": {}},
    "deit's training": lambda s: {"model": under("", s, 1), "model_ema": s},
    "two averages": lambda s: {"student": under("module.backbone.", s, 1), "teacher": under("backbone.", s)},
    "momentum contrast": lambda s: {"state_dict": {**under("encoder_q.", s), **under("encoder_k.", s, 1)}},
    "averages in a list": lambda s: {"model": under("", s, 1), "ema": [s]},
    "half an average": lambda s: {"model": s, "ema": {k: v + 1 for k, v in list(s.items())[2:]}},
    "pretraining": lambda s: {**s, "decoder_embed.weight": torch.zeros(16, 48), "mask_token": torch.zeros(1, 1, 16)},
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_every_wrapping_is_taken(kind, state, tmp_path):
    torch.save(WRAPPINGS[kind](state), tmp_path / "w.pth")
    assert_is(load(tmp_path / "w.pth"), state)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("timm's training", "took state_dict_ema; the file also holds state_dict"),
        ("deit's training", "took model_ema; the file also holds model"),
        ("two averages", "took teacher.backbone; the file also holds student.module.backbone"),
        ("momentum contrast", "took state_dict.encoder_q; the file also holds state_dict.encoder_k"),
        ("only averaged", "took model_ema"),
        ("half an average", "took model; the file also holds ema"),
        ("pretraining", "parts of pretraining left out: decoder_embed.weight"),
    ],
)
def test_what_was_chosen_is_said(kind, said, state, tmp_path, caplog):
    torch.save(WRAPPINGS[kind](state), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="fastirt"):
        load(tmp_path / "w.pth")
    assert any(record.getMessage().endswith(said) for record in caplog.records), caplog.text


def test_two_models_that_nothing_ranks_are_refused_by_name(state, tmp_path):
    torch.save({"query": state, "image": under("", state, 1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds several models: .*query.*image|image.*query"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "W.SAFETENSORS", "pytorch_model.bin", "w.pth", "w"])
def test_safetensors_are_known_by_content(name, state, tmp_path):
    save_file(state, tmp_path / name)
    assert_is(load(tmp_path / name), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, state, tmp_path):
    save_file({name: value.to(dtype) for name, value in state.items()}, tmp_path / "w.safetensors")
    assert_is(load(tmp_path / "w.safetensors"), {name: value.to(dtype).float() for name, value in state.items()})


def test_npz_of_timms_names(state, tmp_path):
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in state.items()})
    assert_is(load(tmp_path / "w.npz"), state)


SMALL = dict(embed_dim=48, depth=1, num_heads=3)


def test_official_dinov2(tmp_path):
    """Its mask token and its position table for 518 x 518, resampled as timm does."""
    kwargs = dict(num_classes=0, **SMALL)
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=518, **kwargs).state_dict()
    torch.save({**theirs, "mask_token": torch.zeros(1, 48)}, tmp_path / "w.pth")
    assert_is(load(tmp_path / "w.pth", "vit_small_patch14_dinov2", SMALL, 518), theirs)
    small = timm.create_model("vit_small_patch14_dinov2", img_size=56, **kwargs)
    expected = timm.models.vision_transformer.checkpoint_filter_fn(theirs, small)
    assert_is(load(tmp_path / "w.pth", "vit_small_patch14_dinov2", SMALL, 56), expected)


def test_official_dinov2_with_registers(tmp_path):
    """Its table has a place for the CLS token, which timm adds to the token itself, and its
    registers another name."""
    torch.manual_seed(2)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    ours, place = model.state_dict(), torch.randn(1, 1, 48)
    theirs = {name: value for name, value in ours.items() if name != "reg_token"}
    theirs |= {"register_tokens": ours["reg_token"], "mask_token": torch.zeros(1, 48)}
    theirs["pos_embed"] = torch.cat([place, ours["pos_embed"]], dim=1)
    torch.save(theirs, tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth", "vit_small_patch14_reg4_dinov2", SMALL, 56)
    assert_is(loaded, {**ours, "cls_token": ours["cls_token"] + place})


@pytest.mark.parametrize(
    "other, looks",
    [
        (dict(model_name="vit_small_patch14_dinov2", img_size=28, depth=3), "a DINOv2 ViT-S (embed_dim 384, depth 3)"),
        (dict(model_name="resnet18"), "a ResNet-18"),
        (dict(model_name="convnext_atto"), "a ConvNeXt"),
    ],
)
def test_a_file_that_fits_no_better_than_half_is_refused_with_what_it_looks_like(other, looks, tmp_path):
    torch.save(timm.create_model(**other, num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError) as refusal:
        load(tmp_path / "w.pth")
    message = str(refusal.value)
    assert looks in message
    assert "--model" in message
    assert "\n" not in message


def test_a_whole_pickled_model_is_refused_unread(state, tmp_path):
    torch.save(timm_model(depth=1), tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt: .*pickled object"):
        load(tmp_path / "w.pt")


@pytest.mark.slow
def test_training_goes_on_from_a_run_and_its_file_without_naming_the_model(image_folder, finished_run, tmp_path):
    """A run's folder, its model file, and the file under a foreign name: the model comes from the
    file."""
    flags = [*folder_flags(image_folder), *f"--device cpu --num-workers 1 --rank 1 --loader {DECODER}".split()]
    train = ["train", *flags, *"--method irt-l --batch-size 8".split()]
    file = finished_run / "model.safetensors"
    (tmp_path / "renamed.bin").write_bytes(file.read_bytes())
    for source in (finished_run, file, tmp_path / "renamed.bin"):
        out = tmp_path / f"from-{source.name}"
        short = ["--max-iter", "0", "--resize-size", "18", "--output-dir", out]
        assert run_cli(*train, *short, "--weights", source) == 0
        assert (out / "model.safetensors").exists()
        assert run_cli("evaluate", *flags, "--weights", source, "--output-dir", tmp_path / f"of-{source.name}") == 0
    assert run_cli(*train, "--model", "deit_tiny_patch16_224", "--weights", file) == 2
