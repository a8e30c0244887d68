"""Contenders of the step: how each is compiled, how they take turns, and their release."""

import argparse
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.parts import step
from benchmarks.results import Results, read
from tests.benchmarks.small import LIMITS
from tests.helpers import CPU, TINY_KWARGS


@pytest.mark.compile
def test_a_contender_with_options_of_the_compiler_is_compiled_with_them(monkeypatch):
    """Two contenders of one shape share what dynamo has compiled, but not one with other options.
    Only inductor is left out."""
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


def test_optimizers_do_equal_work():
    sizes = dict(model="vit_tiny_patch16_224", input_size=16, batch_size=4, slots=20)
    changes = dict(engine="eager", precision="fp32", model_kwargs=TINY_KWARGS, opt="lamb")
    module = step.ours(changes, sizes, CPU)[1]
    assert module.optimizer._get_clip_grad_norm() is None


@pytest.mark.slow
def test_contenders_of_the_step_are_written_by_group_and_let_go(monkeypatch, tmp_path):
    """As on a GPU: the waterfall in turns, then each other beside its last row, one at a time; what
    fails costs itself alone."""
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
    monkeypatch.setattr(step, "profiled", lambda call, device: ({}, {}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    step.add_flags(parser)
    step.run(parser.parse_args(["--quick", "--input-size", "32", "--skip", "graph, max-autotune"]), made)
    first, failing = [*step.WATERFALL, "public recipe"], ["graph, bf16 memory"]
    missing = ("apex", "max-autotune")
    alone = [name for name in step.ABLATIONS if name not in failing and not any(word in name for word in missing)]
    assert [figure.name for figure in made.figures] == first + alone
    assert all(figure.extra["times_graph"] for figure in made.figures)
    assert all(figure.extra["times_public"] for figure in made.figures[: len(first)])
    assert not any(figure.extra["times_public"] for figure in made.figures[len(first) :])
    assert {seen for name, seen, _ in order if name in first and name != step.LAST} == {0}
    for name, _, living in order:
        assert set(living) <= set(first) or set(living) <= {step.LAST, *alone, *failing} and len(living) == 2, name
    assert not alive
    not_run = {row["name"]: row["not_run"] for row in read([made.path]) if "not_run" in row}
    assert not_run["graph, bf16 memory"] == "RuntimeError: cannot be captured"
    assert not_run["graph, apex FusedAdam"] == "ImportError: no apex"
