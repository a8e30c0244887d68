"""Contenders compute the same: losses, the public recipe, variants of the model, float8."""

import sys

import pytest
import torch

from benchmarks.__main__ import main as benchmarks_main
from benchmarks.contenders import losses as peers
from benchmarks.contenders import model_variants, public_recipe
from benchmarks.contenders.float8 import float8_blocks
from benchmarks.parts import loss
from benchmarks.results import Results, read
from fastirt.config.options import ModelConfig
from fastirt.kernels import reference
from fastirt.model.build import build_encoder
from tests.benchmarks.small import LIMITS, QUICK, SMALL
from tests.helpers import CPU


@pytest.mark.parametrize("slots", [0, 40])
def test_all_ways_compute_the_same(slots, monkeypatch):
    """The memory without the batch: pytorch-metric-learning has no own-slot rule."""
    # the compiled way is timed end to end above
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    whole = peers.inputs(24 + slots, 0, 32, torch.float32, CPU)
    given = dict(z=whole["z"][:24], labels=whole["labels"][:24] % 5, memory=None, memory_labels=None, memory_self=None)
    if slots:
        given |= dict(memory=whole["z"][24:], memory_labels=whole["labels"][24:] % 5)
    found = {name: peers.step(given, way)() for name, way in peers.losses("nonzero_mean", CPU, 32).items()}
    assert {"fastirt", "plain", "metric-learning"} <= set(found)
    for name, (value, gradient) in found.items():
        torch.testing.assert_close(value, found["plain"][0], rtol=1e-5, atol=0)
        if name != "metric-learning":  # it differentiates through its own normalisation
            torch.testing.assert_close(gradient, found["plain"][1], rtol=1e-4, atol=1e-6)


@pytest.mark.compile
def test_the_compiled_way_computes_the_same():
    given = peers.inputs(16, 50, 32, torch.float32, CPU)
    ways = peers.losses("nonzero_mean", CPU, 32)
    for plain, compiled in zip(peers.step(given, ways["plain"])(), peers.step(given, ways["compiled"])()):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


def test_peers_too_large_for_the_memory_are_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(loss, "free_bytes", lambda device: 8 * 8 * 32 - 1)
    results = Results(tmp_path / "r.jsonl", CPU, LIMITS)
    loss.measure("anchor_sum", "fp32", 16, 8, 0, results, repeats=1)
    assert [figure.name for figure in results.figures] == ["fastirt"]
    rows = [row for row in read([results.path]) if "not_run" in row]
    assert {row["name"] for row in rows} == {"plain", "compiled"}
    assert all("too little free memory" in row["not_run"] for row in rows)


class Points(torch.nn.Module):
    """A model whose tokens are its weights: (B, 2, D), whatever the images."""

    num_features = 16

    def __init__(self, count):
        super().__init__()
        self.points = torch.nn.Parameter(torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(0)))

    def forward_features(self, images):
        return self.points


def test_the_public_recipe_computes_its_objective():
    """Without a memory: its term counts each row's pair with itself where rounding leaves a loss,
    which ours never does."""
    labels = torch.arange(12) // 3
    model = Points(12)
    z = torch.nn.functional.normalize(model.points[:, 0].detach(), dim=1)
    batch = reference.pair_loss(z, labels, z, labels, self_index=torch.arange(12), reduction="nonzero_mean")
    alone = public_recipe.Recipe(model, 0, CPU, lr=0.0)(torch.zeros(12, 3, 4, 4), labels)
    assert alone == pytest.approx(float(batch + 0.7 * reference.koleo(z)), rel=1e-5)


def test_the_public_recipe_learns_and_its_memory_wraps_as_described():
    labels = torch.arange(12) // 3
    recipe = public_recipe.Recipe(Points(12), 100, CPU, lr=0.1)
    losses = [recipe(torch.zeros(12, 3, 4, 4), labels) for _ in range(8)]
    assert recipe.filled == recipe.head == 96 and losses[-1] < losses[0]
    recipe(torch.zeros(12, 3, 4, 4), labels)  # overflows: over the last slots, then from the start
    assert recipe.filled == 100
    assert recipe.head == 0
    assert torch.equal(recipe.memory_labels[88:], labels)


@pytest.mark.parametrize("with_memory", [False, True])
def test_the_recipe_s_own_contrastive_is_pytorch_metric_learnings(with_memory, monkeypatch):
    theirs = public_recipe.contrastive_loss(0.3)
    assert public_recipe.recipe_name() == "public recipe"
    assert not isinstance(theirs, public_recipe.OwnContrastive)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    own = public_recipe.contrastive_loss(0.3)
    assert public_recipe.recipe_name() == "public recipe (own contrastive)"
    assert isinstance(own, public_recipe.OwnContrastive)
    generator = torch.Generator().manual_seed(0)
    rows, memory = torch.randn(24, 8, generator=generator) + 0.3, torch.randn(40, 8, generator=generator) + 0.3
    labels, others = torch.arange(24) % 5, torch.arange(40) % 7
    found = []
    for contrastive in (theirs, own):
        given = rows.clone().requires_grad_()
        value = contrastive(given, labels, **(dict(ref_emb=memory, ref_labels=others) if with_memory else {}))
        found.append((value, torch.autograd.grad(value, given)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert own(rows, torch.arange(24), ref_emb=-rows, ref_labels=torch.arange(24, 48)).isfinite()
    assert own(rows[:1], labels[:1]) == 0  # no pair


@pytest.mark.slow
def test_without_pytorch_metric_learning_the_others_are_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    out = tmp_path / "here.jsonl"
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert benchmarks_main(["loss", *SMALL["loss"][0].split(), *QUICK, "--out", str(out)]) == 0
    words = "step --input-size 32 --only".split()
    assert benchmarks_main([*words, "public recipe", *QUICK, "--out", str(out)]) == 0
    rows = read([out])
    shown = {row["name"] for row in rows if row["part"] == "loss" and "not_run" not in row}
    assert shown == {"fastirt", "plain", "compiled"}
    assert "no pytorch-metric-learning" in {row["not_run"] for row in rows if row["name"] == "metric-learning"}
    shown = [row["name"] for row in rows if row["part"] == "step" and "not_run" not in row]
    assert shown == ["public recipe (own contrastive)"]


def test_variants_of_the_model_compute_the_same():
    query, key, value = torch.randn(3, 2, 3, 13, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = model_variants.attention("math", query, key, value)
    for length in (13, 16, 32):
        torch.testing.assert_close(
            model_variants.padded_attention(query, key, value, length), plain, rtol=1e-5, atol=1e-6
        )
    encoder = build_encoder(ModelConfig(model="vit_tiny_patch16_224", weights="scratch", model_kwargs=("depth=1",)), 32)
    encoder.to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    found = []
    for _ in range(2):
        encoder.zero_grad()
        embeddings = encoder(images)
        embeddings[:, 0].sum().backward()
        found.append((embeddings.detach(), encoder.vit.patch_embed.proj.weight.grad))
        model_variants.patch_matmul(encoder)
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_float8_layers_follow_the_plain_ones():
    """Within what three bits of mantissa leave, forward and backward."""
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(model="vit_tiny_patch16_224", weights="scratch", model_kwargs=("depth=1",)), 48)
    images, found = torch.randn(8, 3, 48, 48), []
    for _ in range(2):
        encoder.zero_grad()
        embeddings = encoder(images)
        embeddings[:, 0].sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        found.append((embeddings.detach(), gradients))
        float8_blocks(encoder)
    for plain, rounded in zip(*found):
        assert 1e-4 < (rounded - plain).norm() / plain.norm() < 0.15
