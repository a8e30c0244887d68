"""Contenders of the step: how each is compiled, how they take turns, and their release."""

import argparse
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.parts import step
from benchmarks.results import Results, read
from benchmarks.timing import turns
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
def test_contenders_of_the_step_are_written_one_by_one_and_let_go(monkeypatch, tmp_path):
    """As on a GPU: the captured step first, then each other in turns with it, by worth; what fails
    costs itself alone."""
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
    monkeypatch.setattr(step, "turns", lambda names, device: turns(names, torch.device("cuda")))
    monkeypatch.setattr(step, "ours", ours)
    monkeypatch.setattr(step, "peer", lambda sizes, device: Call("public recipe"))
    monkeypatch.setattr(step, "profiled", lambda call, device: ({}, {}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    step.add_flags(parser)
    step.run(parser.parse_args(["--quick", "--input-size", "32", "--skip", "graph, max-autotune"]), made)
    missing = ("apex", "max-autotune", "graph, bf16 memory")
    measured = [name for name in contenders if not any(word in name for word in missing)]
    assert measured[:4] == [step.LAST, "graph, bf16 weights", "+ torch.compile", "public recipe"]
    assert [figure.name for figure in made.figures] == measured
    assert all(figure.extra["times_graph"] for figure in made.figures)
    for name, seen, living in order:
        assert name == step.LAST or name in missing or seen == measured.index(name)
        assert set(living) <= {step.LAST, name} or name == step.LAST and len(living) == 2, (name, living)
    assert not alive
    not_run = {row["name"]: row["not_run"] for row in read([made.path]) if "not_run" in row}
    assert not_run["graph, bf16 memory"] == "RuntimeError: cannot be captured"
    assert not_run["graph, apex FusedAdam"] == "ImportError: no apex"


def test_mfu_is_of_the_data_sheet_not_of_the_measured_products(monkeypatch):
    """As in a run's log. A GPU's products reach about four fifths of its data sheet."""
    monkeypatch.setattr(step, "peak_flops", lambda device, dtype: 2e12)
    monkeypatch.setattr(step, "operations", lambda *_: 1_000_000)
    monkeypatch.setattr(step, "profiled", lambda call, device: ({}, {}))
    results = Results(None, CPU, {"fp32": 1.0, "bf16": 1.0, "GB/s": 1.0})
    sizes = dict(model="vit_tiny_patch16_224", input_size=16, batch_size=10, slots=20)
    step._write("eager fp32", [1e-4] * 3, False, {}, lambda: None, sizes, results)
    (figure,) = results.figures
    assert figure.p50 == pytest.approx(1e5)
    assert figure.share_of_limit == pytest.approx(0.1)
    assert figure.extra["MFU"] == pytest.approx(0.05)


@pytest.mark.parametrize("units", [True, False])
def test_a_cpu_has_a_bf16_row_or_the_reason_why_not(units, monkeypatch, tmp_path):
    monkeypatch.setattr(step, "bf16_units_missing", lambda: "" if units else "no units")
    monkeypatch.setattr(step, "_measure", lambda *_: None)
    results = Results(tmp_path / "r.jsonl", CPU, {})
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    step.add_flags(parser)
    step.run(parser.parse_args(["--quick"]), results)
    not_run = {row["name"]: row["not_run"] for row in read([results.path])}
    assert (step.CPU_BF16 in step.contenders(CPU)) == units
    assert not_run.get(step.CPU_BF16) == (None if units else "no units")
