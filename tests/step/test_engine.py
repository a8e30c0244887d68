"""Engines of the step: compiled equals eager, without recompilation; CUDA graphs on a GPU."""

import pytest
import torch
from torch._dynamo.utils import counters

from fastirt.errors import UserError
from fastirt.model import onednn_linear
from fastirt.step.cuda_graph import CaptureFailed
from fastirt.step.engine import choose_engine, compiled
from fastirt.step.optimizer import load_optimizer, optimizer_state
from fastirt.step.step_counters import LOSS_NAMES
from fastirt.training import checkpoint
from tests.helpers import make_batch, make_step, needs_gpu, no_waiting, run_steps, tiny_config

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# An engine of its own for every machine; on a GPU the capture is what a run takes.
ON_CPU = pytest.mark.skipif(GPU or not onednn_linear.is_available(), reason="needs oneDNN on a CPU")
FAST = ["compile", pytest.param("onednn", marks=ON_CPU), pytest.param("graph", marks=needs_gpu)]
# A GPU's compiler adds in another order than eager, by up to 4e-3 of the loss at step 20.
AFTER_FIVE_STEPS = 2e-2 if GPU else 2e-4
FULL = dict(lr=3e-4, encoder_momentum=0.9, clip_grad=0.5, drop_path=0.2, sched="cosine", warmup_iter=5, max_iter=50)


@pytest.fixture(autouse=True)
def fp32_convolutions(monkeypatch):
    """As in a run: torch's default is tf32, which engines round differently."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_same_curve(found, expected):
    torch.testing.assert_close(found[:5], expected[:5], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(found[5:], expected[5:], rtol=AFTER_FIVE_STEPS, atol=2e-5)


@pytest.mark.compile
@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("settings", [FULL, dict(contrastive="nonzero_mean", drop=0.1)], ids=["momentum", "plain"])
def test_fifty_steps_agree_with_eager(engine, settings):
    """The arithmetic is the same in another order: what differs is rounding, which AdamW amplifies
    where gradients are tiny.

    Measured on a CPU: losses within 2e-6 relative after 50 steps; asked for is 2e-4, on a GPU after
    five steps 2e-2, and weights within a tenth (half) of the distance that training moved them.
    """
    torch.compiler.reset()
    counters.clear()
    steps = {}
    for name in ("eager", engine):
        step = make_step(tiny_config(engine=name, memory_start=2, **settings), device=DEVICE)
        start = [w.detach().clone() for w in step.networks.weights]
        steps[name] = (step, run_steps(step, 0, 50, DEVICE), start)
    (eager, expected, start), (fast, found, _) = steps.values()
    assert_same_curve(found, expected)
    moved = torch.stack([(w - s).norm() for w, s in zip(eager.networks.weights, start)]).norm()
    apart = torch.stack([(w - v).norm() for w, v in zip(eager.networks.weights, fast.networks.weights)]).norm()
    assert apart < (0.5 if GPU else 0.1) * moved, (apart, moved)
    assert (found[3:, LOSS_NAMES.index("contrastive_memory")] > 0).all()
    assert fast.counters.first_bad_step == -1
    assert torch.equal(eager.memory.labels, fast.memory.labels)
    assert eager.memory.pointer == fast.memory.pointer
    assert not counters["graph_break"]


@pytest.mark.compile
@pytest.mark.parametrize("engine", FAST)
def test_nothing_is_compiled_again_after_the_warm_up(engine):
    torch.compiler.reset()
    step = make_step(tiny_config(engine=engine, **FULL), device=DEVICE)
    run_steps(step, 0, 5, DEVICE)
    step.encoder.eval()  # as an evaluation does
    with torch.inference_mode():
        step.encoder(torch.zeros(3, 3, 16, 16, device=DEVICE))
    step.encoder.train()
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        run_steps(step, 5, 12, DEVICE)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.compile
@pytest.mark.parametrize("engine", FAST)
def test_checkpoints_move_between_engines(engine, tmp_path):
    """Ten steps on one engine and ten on the other, both ways round, end where twenty on one do."""
    ends = []
    for first, second in (("eager", "eager"), ("eager", engine), (engine, "eager")):
        step = make_step(tiny_config(engine=first, **FULL), device=DEVICE)
        run_steps(step, 0, 10, DEVICE)
        state = {"module": step.state_dict(), "optimizer": optimizer_state(step.optimizer)}
        checkpoint.save(tmp_path / "state.safetensors", state)
        state = checkpoint.load(tmp_path / "state.safetensors")
        step = make_step(tiny_config(engine=second, **FULL), device=DEVICE)
        step.load_state_dict(state["module"])
        load_optimizer(step.optimizer, state["optimizer"])
        ends.append(run_steps(step, 10, 20, DEVICE))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=AFTER_FIVE_STEPS, atol=2e-5)


@needs_gpu
def test_a_captured_step_is_one_launch_and_never_waits():
    step = make_step(tiny_config(engine="graph", **FULL), device="cuda")
    batches = [make_batch(number, device=DEVICE) for number in range(8)]
    for batch in batches[:5]:
        step(batch)
    with no_waiting(), torch.profiler.profile() as profile:
        step(batches[5])
    torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch") == 1
    assert step.counters.first_bad_step == -1


@needs_gpu
def test_a_captured_step_holds_after_a_bad_one():
    step = make_step(tiny_config(engine="graph", **FULL), device="cuda")
    run_steps(step, 0, 6, DEVICE)
    step.memory.embeddings[0, 0] = float("nan")
    before = [w.detach().clone() for w in step.networks.weights]
    run_steps(step, 6, 8, DEVICE)
    assert step.counters.first_bad_step == 6
    assert all(torch.equal(w, b) for w, b in zip(step.networks.weights, before))


class Breaks:
    """A capture that fails, as on a machine where something in the step cannot be captured."""

    enabled = True

    def __call__(self, body):
        if self.enabled:
            raise CaptureFailed("--engine graph: no")
        body()

    def forget(self): ...


@pytest.mark.compile
def test_a_step_that_cannot_be_captured_goes_on_without(caplog):
    """Where nobody asked for the graph; else it is said."""
    plain, step = (make_step(tiny_config(engine="auto", **FULL)) for _ in range(2))
    step.engine.capture, step.engine.may_fall_back = Breaks(), False
    with pytest.raises(CaptureFailed):
        step(make_batch(0))
    step.engine.may_fall_back = True
    for number in range(3):
        plain(make_batch(number))
        step(make_batch(number))
    assert torch.equal(step.counters.sums, plain.counters.sums)
    assert step.engine.name == "compile"
    assert caplog.text.count("without the graph") == 1


@needs_gpu
@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("engine", ["auto", "graph"])
def test_a_broken_capture_names_the_cause_and_leaves_the_stream_as_it_was(engine, drop, caplog):
    step = make_step(tiny_config(engine=engine, drop=drop, **FULL), device="cuda")
    step.on_phase_end = lambda phase: torch.cuda.synchronize() if phase == "objective" else None
    before = torch.cuda.current_stream()
    if engine == "graph":
        with pytest.raises(CaptureFailed, match="not permitted|capturing"):
            run_steps(step, 0, 6, DEVICE)
    else:
        curve = run_steps(step, 0, 8, DEVICE)
        assert step.engine.name == "compile"
        assert torch.isfinite(curve).all()
        assert "without the graph" in caplog.text
    assert torch.cuda.current_stream() == before
    # Memory used on another stream is given back, as it would not be within a capture.
    held = torch.cuda.memory_allocated()
    other = torch.empty(2**24, device="cuda")
    other.record_stream(torch.cuda.Stream())
    torch.cuda.synchronize()
    del other
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() < held + 2**24


def test_auto_takes_the_graph_where_device_and_optimizer_can():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert choose_engine("auto", cpu, "adamw") == "eager"
    assert choose_engine("auto", gpu, "adamw") == choose_engine("auto", gpu, "apex-fused-adam") == "graph"
    assert choose_engine("onednn", gpu, "adamw") == "graph"  # a run that began on a CPU
    assert choose_engine("auto", gpu, "lamb") == choose_engine("auto", gpu, "apex-fused-lamb") == "compile"
    for device, opt, words in ((cpu, "adamw", "needs a GPU"), (gpu, "lamb", "counts its steps on the host")):
        with pytest.raises(UserError, match=words):
            choose_engine("graph", device, opt)


def test_a_model_that_does_not_compile_is_one_line():
    def breaks(x):
        print(x.sum().item())
        return x

    with pytest.raises(UserError, match="use --engine eager") as caught:
        compiled(breaks)(torch.ones(3))
    assert "\n" not in str(caught.value)
