"""The encoder: pooling, descriptors, drop path, keys, and models it refuses."""

import copy

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from fastirt.config.options import Config, ModelConfig
from fastirt.errors import UserError
from fastirt.model.build import build_encoder
from fastirt.model.drop_path import MaskedDropPath
from fastirt.model.momentum_encoder import make_momentum_encoder, momentum_update
from fastirt.model.save import save_model
from fastirt.model.weights.load import read_model_metadata
from tests.helpers import TINY_KWARGS, TINY_MODEL, timm_model

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(size=16, **changes):
    torch.manual_seed(0)
    tiny = dict(model=TINY_MODEL, model_kwargs=TINY_KWARGS, weights="scratch")
    return build_encoder(ModelConfig(**{**tiny, **changes}), size)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "gem"])
def test_poolings_equal_their_definitions(pooling):
    encoder = build(pooling=pooling).eval()
    tokens = encoder.vit.forward_features(IMAGES)
    patches = tokens[:, 1:]
    expected = {
        "cls": tokens[:, 0],
        "mean": patches.mean(1),
        "max": patches.amax(1),
        "gem": patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
    }[pooling]
    out = encoder(IMAGES)
    torch.testing.assert_close(out, expected / expected.norm(dim=1, keepdim=True))
    assert out.shape == (4, encoder.embed_dim) and out.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(IMAGES)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


def test_a_model_that_the_meta_device_cannot_run_is_checked_on_the_cpu(monkeypatch):
    expected, forward, ran_on = build(), VisionTransformer.forward_features, []

    def without_meta(self, images, *rest):
        ran_on.append(images.device.type)
        if images.device.type == "meta":
            raise NotImplementedError("no meta kernel")
        return forward(self, images, *rest)

    monkeypatch.setattr(VisionTransformer, "forward_features", without_meta)
    encoder = build()
    assert ran_on == ["meta", "cpu"]
    for weight, other in zip(encoder.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_cls_equals_timm_and_a_model_without_cls_says_so():
    encoder = build().eval()
    torch.testing.assert_close(encoder(IMAGES), torch.nn.functional.normalize(encoder.vit(IMAGES), dim=1))
    with pytest.raises(UserError, match="no CLS token.*--pooling mean"):
        build(model_kwargs=(*TINY_KWARGS, "class_token=False", "global_pool='avg'"))
    pooled = build(model_kwargs=(*TINY_KWARGS, "class_token=False", "global_pool='avg'"), pooling="mean").eval()
    torch.testing.assert_close(pooled(IMAGES), torch.nn.functional.normalize(pooled.vit(IMAGES), dim=1))


def test_distilled_descriptor_in_training_and_evaluation():
    kwargs = dict(model="deit_tiny_distilled_patch16_224", model_kwargs=TINY_KWARGS)
    both = build(**kwargs, eval_descriptor="cls+dist")
    with torch.no_grad():
        both.vit.dist_token.normal_()
    tokens = both.vit.forward_features(IMAGES)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(both.train()(IMAGES), unit(tokens[:, 0], dim=1))
    torch.testing.assert_close(both.eval()(IMAGES), unit((tokens[:, 0] + tokens[:, 1]) / 2, dim=1))
    torch.testing.assert_close(both.eval()(IMAGES), unit(both.vit(IMAGES), dim=1))
    only = build(**kwargs, eval_descriptor="cls")
    only.vit.load_state_dict(both.vit.state_dict())
    torch.testing.assert_close(only.eval()(IMAGES), unit(tokens[:, 0], dim=1))


def test_drop_path_masks_belong_to_positions_and_follow_the_law():
    encoder = build(drop_path=0.4).train()
    layers = [m for m in encoder.modules() if isinstance(m, MaskedDropPath)]
    # depth 2: the first block has rate 0
    assert [round(encoder.table.rates[m.row], 3) for m in layers] == [0.4, 0.4]
    encoder.draw_masks(1, 7, 4096)
    whole = encoder.table.masks.clone()
    values = set(np.round(whole.unique().tolist(), 5))
    assert values == {0.0, round(1 / 0.6, 5)}
    assert abs((whole == 0).float().mean().item() - 0.4) < 0.03
    encoder.draw_masks(1, 7, 4096, first=100, count=50)
    assert torch.equal(encoder.table.masks, whole[:, 100:150])
    for other in [(2, 7, "encoder"), (1, 8, "encoder"), (1, 7, "momentum_encoder")]:
        encoder.draw_masks(other[0], other[1], 4096, stream=other[2])
        assert not torch.equal(encoder.table.masks, whole)
    x = torch.ones(4096, 2, 3)
    encoder.draw_masks(1, 7, 4096)
    assert torch.equal(layers[0](x)[:, 0, 0], whole[0])
    encoder.eval()
    assert layers[0](x) is x


def test_the_mask_buffer_keeps_its_address():
    encoder = build(drop_path=0.4).train()
    encoder.draw_masks(0, 0, 8)
    address = encoder.table.masks.data_ptr()
    encoder.draw_masks(0, 1, 8)
    assert encoder.table.masks.data_ptr() == address
    assert not any("mask" in name for name in encoder.state_dict())


@pytest.mark.parametrize("hold", [None, False, True])
def test_the_momentum_encoder_follows_unless_held(hold):
    encoder = build(drop_path=0.2)
    keys = make_momentum_encoder(encoder)
    assert keys.training
    assert not any(p.requires_grad for p in keys.parameters())
    assert keys.table is not encoder.table
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(keys.state_dict())
    momentum_update(keys, encoder, 0.9, None if hold is None else torch.tensor(hold))
    for name, value in keys.state_dict().items():
        expected = before[name] if hold else 0.9 * before[name] + 0.1 * encoder.state_dict()[name]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "changes, size, saying",
    [
        (dict(model="vit_tiny_patch16_242"), 16, "close names: vit_tiny_patch16_224"),
        (dict(model="resnet18", model_kwargs=()), 224, "not a"),
        (dict(), 20, "use 16 or 24"),
        (dict(), 4, "use 8"),
        (dict(model_kwargs=("depth",)), 16, "key=value"),
        (dict(model_kwargs=("no_such=1",)), 16, "no_such"),
        (dict(model_kwargs=("patch_size=0",)), 16, "takes these settings"),
        (dict(model_kwargs=("img_size=32",)), 16, "--input-size"),
        (dict(weights="deit_small_patch16_224.fb_in1k"), 16, "another model"),
    ],
)
def test_what_no_encoder_can_be_built_from_is_one_line(changes, size, saying):
    with pytest.raises(UserError) as error:
        build(size, **changes)
    assert saying in str(error.value)
    assert "\n" not in str(error.value)


def test_drop_means_dropout_inside_the_blocks():
    encoder = build(drop=0.5).train()
    torch.manual_seed(1)
    one = encoder(IMAGES)
    torch.manual_seed(2)
    assert not torch.equal(one, encoder(IMAGES))
    assert torch.equal(encoder.eval()(IMAGES), encoder(IMAGES))


def test_a_timm_tag_is_a_name_of_weights():
    with pytest.raises(UserError, match="deit_tiny_patch16_224.fb_in1k: .*download"):
        build(model="deit_tiny_patch16_224", model_kwargs=(), size=224, weights="deit_tiny_patch16_224.fb_in1k")


def test_no_network_means_an_error_that_names_weights_never_random_ones():
    with pytest.raises(UserError, match="--weights FILE"):
        build(model="deit_tiny_patch16_224", model_kwargs=(), size=224, weights=None)


def test_saved_model_is_timm_s_and_describes_itself(tmp_path):
    encoder = build(pooling="mean")
    file = tmp_path / "m.safetensors"
    save_model(encoder, file, Config().replace(method="irt-l", input_size=16, resize="shorter", resize_size=18))
    theirs, ours = timm_model(file).state_dict(), encoder.vit.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert read_model_metadata(file) == {
        "method": "irt-l",
        "recipe": "paper",
        "model": TINY_MODEL,
        "model_kwargs": TINY_KWARGS,
        "input_size": 16,
        "pooling": "mean",
        "eval_descriptor": "cls",
        "resize": "shorter",
        "resize_size": 18,
        "orientation": "stored",
        "normalization": "model",
    }
