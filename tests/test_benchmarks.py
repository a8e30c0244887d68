"""The benchmark suite on the CPU: what is timed is what is tested, and every figure has its limit beside it."""

import argparse
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.__main__ import PARTS
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.contenders import losses as peers
from benchmarks.contenders import model_variants, public_recipe
from benchmarks.contenders.float8 import float8_blocks
from benchmarks.parts import cache, loss, scaling, step
from benchmarks.results import Results, figure_of, read
from benchmarks.rounds import counted, in_turns
from benchmarks.timing import samples
from conftest import TINY_KWARGS
from fastirt.config.options import ModelConfig
from fastirt.kernels import reference, tune
from fastirt.kernels.tile_table import Tile, TileRow
from fastirt.model.build import build_encoder

CPU = torch.device("cpu")
QUICK = "--quick --device cpu --repeats 2".split()
LIMITS = {"GB/s": 10.0, "bf16": 0.1, "tf32": 0.1, "fp32": 0.1}
# Flags that make a part small, and the contenders that a CPU has.
SMALL = {
    "loss": ("--rows 16 --slots 50 --dim 32 --dtype fp32", {"plain", "compiled", "metric-learning"}),
    "cache": ("--images 20 --side 40 --crop 32", {"fastirt, host", "torch indexing"}),
    "input": ("--images 48 --batches 1 --workers 2", {"decode alone", "decode alone, packed", "public recipe", "torchvision v2", "fastirt files", "fastirt packed", "fastirt files, PIL"}),
    "step": ("--input-size 32 --only", {"eager fp32", "public recipe", "compile fp32"}),
    "attention": ("--tokens 20 --heads 2 --dim 8", {"torch's choice", "flash", "math", "padded to 200", "padded to 256"}),
    "train": ("--steps 15 --images 48", {"fastirt", "fastirt, no cache", "public recipe"}),
    "retrieval": ("--queries 200 --dim 16 --k 5", {"fastirt (FAISS)", "fastirt (torch)", "torch product + topk", "FAISS IndexFlatIP"}),
    "scaling": ("--step-ms 4", {"memory whole, alone", "memory whole, gloo", "memory sharded, gloo", "model (not measured), memory whole", "model (not measured), memory sharded"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_end_to_end(part, tmp_path):
    out = tmp_path / "results" / "here.jsonl"
    flags, names = SMALL[part]
    words = flags.split() + (sorted(names) if flags.endswith("--only") else [])
    assert benchmarks_main([part, *words, *QUICK, "--out", str(out)]) == 0
    rows = read([out])
    figures = [row for row in rows if "not_run" not in row]
    assert {row["name"] for row in figures if row["part"] == part} == names
    assert {row["name"] for row in figures if row["part"] == "ceilings"} == {"GB/s", "bf16", "tf32", "fp32"}
    for row in figures:
        assert row["device"].startswith("CPU") and row["versions"]["torch"] == torch.__version__ and row["commit"]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        if row["limit"]:
            shares = sorted((row["p50"] / row["limit"], row["limit"] / row["p50"]))
            assert row["share_of_limit"] in (pytest.approx(shares[0]), pytest.approx(shares[1]))
        assert row["limit"] or part == "scaling" or row["name"].startswith("decode alone") or row["part"] == "ceilings"
    if part in ("loss", "cache", "step"):
        assert any(row["part"] == part for row in rows if "not_run" in row)  # what needs a GPU is listed


@pytest.mark.slow
def test_several_parts_in_one_process(tmp_path):
    out = tmp_path / "here.jsonl"
    words = "attention cache --images 20 --side=40 --crop 32 --tokens 20 --heads 2 --dim 8 --batch-size 2".split()
    assert benchmarks_main([*words, *QUICK, "--out", str(out)]) == 0
    figures = [row for row in read([out]) if "not_run" not in row]
    assert [row["part"] for row in figures].count("ceilings") == 4
    for part in ("attention", "cache"):
        assert {row["name"] for row in figures if row["part"] == part} == SMALL[part][1]
    assert {row["params"]["batch_size"] for row in figures if row["part"] != "ceilings"} == {2}


@pytest.mark.parametrize(
    "words, said",
    [
        ("cache loss --queries 5", "--queries 5: none of cache, loss has this flag"),
        ("cache loss 7", "7: none of cache, loss has this flag"),
        ("cache attention --batch-size 2 3", "unrecognized arguments: 3"),
        ("cache loss --rows x", "argument --rows: invalid int value: 'x'"),
        ("cache nothing", "unrecognized arguments: nothing"),
        ("all --rows 5", "unrecognized arguments: --rows 5"),
    ],
)
def test_flags_of_several_parts_that_are_wrong(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmarks_main(words.split())
    assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.compile
def test_dynamo_may_compile_as_often_as_there_are_contenders():
    before, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 8
    try:
        assert benchmarks_main(["cache", *SMALL["cache"][0].split(), *QUICK, "--no-save"]) == 0
        assert torch._dynamo.config.recompile_limit > 1000
    finally:
        torch._dynamo.config.recompile_limit = before


def test_a_cache_s_random_bytes_do_not_repeat_with_its_pictures():
    pixels = torch.zeros(3 * cache.TILE // 2, dtype=torch.uint8)
    cache.fill(pixels)
    assert (pixels[cache.TILE :] == pixels[: cache.TILE // 2 - 1 + cache.TILE % 2]).all()
    assert (pixels != 0).float().mean() > 0.99 and cache.TILE % (256 * 256 * 3)


@pytest.mark.slow
def test_all_goes_on_after_a_part_that_fails(tmp_path, monkeypatch, capsys):
    import importlib

    ran = []

    class Part:
        def __init__(self, name):
            self.name = name

        def add_flags(self, parser):
            parser.add_argument("--rows", type=int, default=7)

        def run(self, args, results):
            ran.append((self.name, args.rows, args.quick))
            if self.name == "loss":
                raise RuntimeError("no luck\nat all")

    real = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name: Part(name.rpartition(".")[2]) if name.startswith("benchmarks.") else real(name),
    )
    out = tmp_path / "all.jsonl"
    assert benchmarks_main(["all", *QUICK, "--out", str(out)]) == 1
    assert ran == [(name, 7, True) for name in PARTS]
    assert [row["not_run"] for row in read([out]) if "not_run" in row] == ["RuntimeError: no luck"]


@pytest.mark.parametrize("slots", [0, 40])
def test_all_ways_compute_the_same(slots, monkeypatch):
    """The memory without the batch: pytorch-metric-learning has no own-slot rule."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the compiled way is timed end to end above
    whole = peers.inputs(24 + slots, 0, 32, torch.float32, CPU)
    given = dict(z=whole["z"][:24], labels=whole["labels"][:24] % 5, memory=None, memory_labels=None, memory_self=None)
    if slots:
        given |= dict(memory=whole["z"][24:], memory_labels=whole["labels"][24:] % 5)
    found = {name: peers.step(given, way)() for name, way in peers.losses("nonzero_mean", CPU, 32).items()}
    assert {"plain", "metric-learning"} <= set(found)  # fastirt under the interpreter, where that is on
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


def test_the_model_of_many_ranks_by_hand():
    """Links of 1 and 0.1 GB/s, 10 MB of gradients, 1 MB to exchange, 3 rounds of 1 ms a hop in a node and 2 between; the backward hides two
    thirds of a step."""
    links = dict(
        step_ms=30, gradient_bytes=1e7, exchange_bytes=1e6, rounds=3, link_gb_s=1, network_gb_s=0.1, link_latency_us=1000,
        network_latency_us=2000, gpus_per_node=2,
    )  # fmt: skip
    assert scaling.predicted(1, **links) == 30
    assert scaling.predicted(2, **links) == pytest.approx(30 + 1 + 3)  # a ring of 10 ms is hidden
    assert scaling.predicted(8, **links) == pytest.approx(
        30 + (175 - 20) + 70 + 3 * (4 * 2 + 3 * 1)
    )  # over the network it is not


def test_bytes_and_operations_by_hand():
    """N = 2, M = 3, D = 4, bf16: 5 vectors of 8 bytes with labels of 8 are read twice, 2 gradients of 8 bytes are written;
    2 x 5 similarities of 4 products and 4 sums in each pass, and as many for the weighted sums."""
    assert loss.counts(2, 3, 4, 2) == (2 * 5 * 16 + 2 * 8, 3 * 10 * 8)
    moved, operations = loss.counts(64, 59551, 384, 2)
    assert operations == 6 * 64 * 59615 * 384
    assert moved == 2 * 59615 * (768 + 8) + 64 * 768


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (RuntimeError("cannot be captured\nat all"), "RuntimeError: cannot be captured"),
        (ImportError(""), "ImportError: "),
    ],
)
@pytest.mark.parametrize("after", [0, 4])
def test_a_call_that_fails_is_reported_and_the_others_go_on(error, words, after):
    """At once, and between measured calls."""

    def failing():
        calls = []

        def call():
            calls.append(None)
            if len(calls) > after:
                raise error

        return call

    timed, _ = samples({"works": lambda: None, "fails": failing()}, CPU, repeats=3)
    assert len(timed["works"]) == 3 and timed["fails"] == words
    turns = in_turns({"works": lambda: None, "fails": failing()}, CPU, rounds=3, steps=2, warm_up=1)
    assert len(turns["works"].seconds) == 3 and turns["fails"] == words


def test_launches_count_neither_spans_nor_copies_as_kernels():
    def event(key, count, device="CPU", span=False):
        kind = getattr(torch.profiler.DeviceType, device)
        return SimpleNamespace(key=key, count=count, device_type=kind, is_user_annotation=span)

    events = [
        event("cudaLaunchKernelExC", 3),
        event("cuLaunchKernel", 2),
        event("cudaGraphLaunch", 1),
        event("aten::mm", 7),
    ]
    events += [event("some kernel", 5, "CUDA"), event("Memcpy HtoD (Pinned -> Device)", 2, "CUDA")]
    events += [event("Memset (Device)", 1, "CUDA"), event("Optimizer.step#AdamW.step", 1, "CUDA", span=True)]
    assert counted(events, torch.device("cuda")) == {"launches": 6, "kernels": 5, "copies": 3}
    assert counted(events, CPU) == {"operators": 7}


def test_peers_too_large_for_the_memory_are_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(loss, "free_bytes", lambda device: 8 * 8 * 32 - 1)
    results = Results(tmp_path / "r.jsonl", CPU, LIMITS)
    loss.measure("anchor_sum", "fp32", 16, 8, 0, results, repeats=1)
    assert not results.figures
    assert {row["name"]: row["not_run"][:23] for row in read([results.path])} == dict.fromkeys(
        ("plain", "compiled"), "too little free memory "
    )


def test_quantiles_and_shares():
    figure = figure_of([1, 2, 3, 4, 5, 6], part="p", name="n", unit="ms", params={}, better="lower", limit=1.75)
    assert (figure.p20, figure.p50, figure.p80, figure.repeats) == (2.0, 3.5, 5.0, 6) and figure.share_of_limit == 0.5
    assert figure_of([4.0], part="p", name="n", unit="imgs/s", params={}, limit=8.0).share_of_limit == 0.5


class Points(torch.nn.Module):
    """A model whose tokens are its weights: (B, 2, D), whatever the images."""

    num_features = 16

    def __init__(self, count):
        super().__init__()
        self.points = torch.nn.Parameter(torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(0)))

    def forward_features(self, images):
        return self.points


def test_the_public_recipe_computes_its_objective():
    """Against the batch. Its memory's term counts each row's pair with itself where rounding leaves a loss, which ours never does."""
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
    assert recipe.filled == 100 and recipe.head == 0 and torch.equal(recipe.memory_labels[88:], labels)


@pytest.mark.parametrize("with_memory", [False, True])
def test_the_recipe_s_own_contrastive_is_pytorch_metric_learnings(with_memory, monkeypatch):
    theirs = public_recipe.contrastive_loss(0.3)
    assert public_recipe.recipe_name() == "public recipe" and not isinstance(theirs, public_recipe.OwnContrastive)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    own = public_recipe.contrastive_loss(0.3)
    assert public_recipe.recipe_name() == "public recipe (own contrastive)" and isinstance(
        own, public_recipe.OwnContrastive
    )
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
    assert {row["name"] for row in rows if row["part"] == "loss" and "not_run" not in row} == {"plain", "compiled"}
    assert "no pytorch-metric-learning" in {row["not_run"] for row in rows if row["name"] == "metric-learning"}
    shown = [row["name"] for row in rows if row["part"] == "step" and "not_run" not in row]
    assert shown == ["public recipe (own contrastive)"]


@pytest.mark.compile
def test_a_contender_with_options_of_the_compiler_is_compiled_with_them(monkeypatch):
    """Two contenders of one shape share what dynamo has compiled, but not one with other options. Only inductor is left out."""
    seen = []

    def compile_fx(graph, inputs, config_patches, **_):
        seen.append(config_patches.get("max_autotune"))
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compiler.reset()
    counters.clear()
    sizes = dict(model="vit_tiny_patch16_224", input_size=16, batch_size=4, slots=20)
    changes = dict(engine="compile", precision="fp32", model_kwargs=TINY_KWARGS)
    graphs = []
    for options in ({}, {}, step.ABLATIONS["graph, max-autotune"]):
        step.ours({**changes, **options}, sizes, CPU)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert graphs == [2, 2, 4] and seen == [None, None, True, True]  # encoder and objective


def test_optimisers_do_equal_work():
    sizes = dict(model="vit_tiny_patch16_224", input_size=16, batch_size=4, slots=20)
    changes = dict(engine="eager", precision="fp32", model_kwargs=TINY_KWARGS, opt="lamb")
    module = step.ours(changes, sizes, CPU)[1]
    assert module.optimizer._get_clip_grad_norm() is None


@pytest.mark.slow
def test_contenders_of_the_step_are_written_by_group_and_let_go(monkeypatch, tmp_path):
    """As on a GPU: the waterfall in turns, then each other beside its last row, one at a time; what fails costs itself alone."""
    alive, order, made = weakref.WeakSet(), [], Results(tmp_path / "r.jsonl", CPU, LIMITS)

    class Call:
        def __init__(self, name):
            self.name, self.count = name, 0
            alive.add(self)

        def __call__(self):
            self.count += 1
            if self.name == "graph, bf16 memory" and self.count == 4:
                raise RuntimeError("cannot be captured")
            order.append((self.name, len(made.figures), sorted(call.name for call in alive)))

    def ours(changes, sizes, device):
        if "apex" in changes.get("opt", ""):
            raise ImportError("no apex")
        return Call(names[id(changes)]), None

    contenders = step.contenders(torch.device("cuda"))
    names = {id(changes): name for name, changes in contenders.items()}
    monkeypatch.setattr(step, "contenders", lambda device: contenders)
    monkeypatch.setattr(step, "ours", ours)
    monkeypatch.setattr(step, "peer", lambda sizes, device: Call("public recipe"))
    monkeypatch.setattr(step, "launches", lambda call, device: {})
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    step.add_flags(parser)
    step.run(parser.parse_args(["--quick", "--input-size", "32", "--skip", "graph, max-autotune"]), made)
    first, failing = [*step.WATERFALL, "public recipe"], ["graph, bf16 memory"]
    alone = [
        name for name in step.ABLATIONS if "apex" not in name and "max-autotune" not in name and name not in failing
    ]
    assert [figure.name for figure in made.figures] == first + alone
    assert all(figure.extra["times_public"] and figure.extra["times_graph"] for figure in made.figures[: len(first)])
    assert all(
        figure.extra["times_graph"] and not figure.extra["times_public"] for figure in made.figures[len(first) :]
    )
    assert {seen for name, seen, _ in order if name in first and name != step.LAST} == {0}
    for name, _, living in order:
        assert set(living) <= set(first) or set(living) <= {step.LAST, *alone, *failing} and len(living) == 2, name
    assert not alive
    missing = {row["name"]: row["not_run"] for row in read([made.path]) if "not_run" in row}
    assert missing["graph, bf16 memory"] == "RuntimeError: cannot be captured"
    assert missing["graph, apex FusedAdam"] == "ImportError: no apex"


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


def test_unknown_part(capsys):
    with pytest.raises(SystemExit) as caught:
        benchmarks_main(["nothing"])
    assert caught.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err


def test_the_tuner_prints_rows_of_the_table():
    tile = Tile(64, 32, 128, 8, 3, grad_chunks=3, skip_inactive=True, waves=2, source="NVIDIA H100")
    line = tune.row("grad", 90, "bf16", 384, 64, tile, "NVIDIA H100")
    assert line.startswith(
        'TileRow("grad", (90,), "bf16", 384, 64, Tile(64, 32, 128, 8, 3, grad_chunks=3, skip_inactive=True, waves=2, source='
    )
    assert eval(line.removesuffix(",")) == TileRow("grad", (90,), "bf16", 384, 64, tile)


@pytest.mark.parametrize("kind", ["stats", "grad"])
def test_the_tuner_s_tiles_are_few_and_differ(kind):
    tiles = list(tune.candidates(kind, "bf16", 384, 227 * 1024))
    assert 20 < len(tiles) == len(set(tiles)) < 500


def test_the_tuner_needs_a_gpu(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["tune"])
    assert tune.main() == 1
    assert capsys.readouterr().err.splitlines() == ["fastirt.kernels.tune: needs a GPU, and TRITON_INTERPRET unset"]
