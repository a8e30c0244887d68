"""The printed line of plain timm gives the descriptors of the run, in every model family."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open

from fastirt.config.options import Config, ModelConfig
from fastirt.errors import UserError
from fastirt.model.build import build_encoder
from fastirt.model.encoder import Encoder
from fastirt.model.save import save_model
from fastirt.model.weights.timm_line import loading_line

FAMILIES = {  # a model, and the side of its images
    "vit": ("vit_tiny_patch16_224", 32),
    "deit": ("deit_tiny_patch16_224", 32),
    "distilled deit": ("deit_tiny_distilled_patch16_224", 32),
    "deit3": ("deit3_small_patch16_224", 32),
    "clip": ("vit_base_patch32_clip_224", 64),
    "siglip": ("vit_base_patch16_siglip_224", 32),
    "siglip gap": ("vit_base_patch16_siglip_gap_224", 32),
    "dinov2": ("vit_small_patch14_dinov2", 28),
    "dinov2 reg4": ("vit_small_patch14_reg4_dinov2", 28),
    "dinov3": ("vit_small_patch16_dinov3", 32),
    "eva02": ("eva02_tiny_patch14_224", 28),
    "eva02 clip": ("eva02_base_patch16_clip_224", 32),
    "beit": ("beit_base_patch16_224", 32),
    "beitv2": ("beitv2_base_patch16_224", 32),
    "pe core": ("vit_pe_core_tiny_patch16_384", 32),
    "cait": ("cait_xxs24_224", 32),
}


def saved(tmp_path, name, size, **changes):
    """An encoder with weights that hide nothing, in a file, and the line that the file carries."""
    torch.manual_seed(0)
    config = ModelConfig(**{**dict(model=name, weights="scratch", model_kwargs=("depth=2",)), **changes})
    encoder = build_encoder(config, size).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    file = tmp_path / "model.safetensors"
    save_model(encoder, file, Config())
    with safe_open(file, framework="pt") as stored:
        return encoder, file, stored.metadata().get("load")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "gem"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_line_in_the_file_gives_the_runs_descriptors(family, pooling, tmp_path):
    name, size = FAMILIES[family]
    try:
        encoder, file, line = saved(tmp_path, name, size, pooling=pooling)
    except UserError as error:
        assert pooling == "cls"
        assert "no CLS token" in str(error)
        assert family.startswith("siglip")
        return
    assert line == loading_line(encoder, file)
    space = {"timm": timm, "F": F, "x": torch.randn(3, 3, size, size)}
    with torch.no_grad():
        exec(line, space)
        expected = encoder(space["x"])
    torch.testing.assert_close(space["z"], expected, rtol=0, atol=1e-5)


def test_distilled_models_averaging_both_tokens_have_a_line_too(tmp_path):
    name, size = FAMILIES["distilled deit"]
    encoder, _, line = saved(tmp_path, name, size, eval_descriptor="cls+dist")
    space = {"timm": timm, "F": F, "x": torch.randn(3, 3, size, size)}
    with torch.no_grad():
        exec(line, space)
        torch.testing.assert_close(space["z"], encoder(space["x"]), rtol=0, atol=1e-5)


class Reversed(Encoder):
    """What no call of timm gives."""

    def forward(self, images):
        return super().forward(images).flip(1)


def test_where_no_line_is_exact_there_is_none_and_random_numbers_stay_as_they_were(tmp_path):
    name, size = FAMILIES["vit"]
    encoder, file, line = saved(tmp_path, name, size)
    other = Reversed(encoder.vit, encoder.config, size)
    state = torch.get_rng_state()
    assert line is not None and loading_line(other, file) is None
    assert torch.equal(torch.get_rng_state(), state)
    save_model(other, file, Config())
    with safe_open(file, framework="pt") as stored:
        assert "load" not in stored.metadata()
