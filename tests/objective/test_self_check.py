"""The self-check: planted faults in a process of its own, the decision, and the cache."""

import json
import logging
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import fastirt.objective.self_check as parent
from fastirt import commands
from fastirt.config.options import Config
from fastirt.distributed.ranks import SINGLE_PROCESS
from fastirt.kernels import gather, gather_views
from fastirt.kernels.checks import REPLACED
from fastirt.kernels.passes.self_check import CHECKS, GROUPS, deviation, small_batch
from fastirt.objective.retrieval_loss import build_objective
from fastirt.training.training_state import check_compatible
from tests.helpers import read_metrics, run_cli

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"  # there in the interpreter
# Python imports a module of this name when it starts: so the planted faults reach the child.
PLANTED = """
import sys, time
if "fastirt.kernels.passes.self_check" in sys.orig_argv:
    import fastirt.kernels.gather as gather, fastirt.kernels.operators as operators
    class Idle:
        def __getitem__(self, grid):
            return lambda *args, **options: None
    def raising(*args, **options):
        raise RuntimeError("ptxas:\\n  unknown instruction")
    def hanging(*args, **options):
        time.sleep(300)
    from fastirt.kernels.counts import similarities
    gather.gather_kernel = similarities.count_kernel = Idle()
    operators.launch.forward = hanging if "pair_stats" in sys.orig_argv else raising
"""
GOOD = {name: ["ok", ""] for name in CHECKS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parent, "machine_key", lambda device: "a GPU, driver 1")
    yield
    REPLACED.clear()


def checking(monkeypatch, results):
    """Let the processes give `results`; returns the list of calls."""
    calls = []
    monkeypatch.setattr(parent, "run_checks", lambda device: calls.append(device) or results)
    return calls


def replace(device="cuda:0", ranks=SINGLE_PROCESS, **flags):
    parent.replace_faulty_kernels(Config().replace(device=device, **flags), ranks)


def recorded_processes(monkeypatch):
    started, popen = [], parent.subprocess.Popen
    monkeypatch.setattr(parent.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    return started


@pytest.mark.slow
def test_sound_kernels_pass_in_processes_of_their_own():
    assert parent.run_checks(DEVICE) == GOOD


@pytest.mark.slow
def test_a_wrong_a_raising_and_a_hanging_kernel_are_found(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(parent, "KERNEL_LIMIT", 5)
    started = recorded_processes(monkeypatch)
    start = time.monotonic()
    results = parent.run_checks(DEVICE)
    assert {status for status, _ in results.values()} == {"failed"}
    assert results["gather_views"][1].startswith("bytes deviates by")
    assert results["count_similarities"][1].startswith("above deviates by")
    assert results["contrastive_koleo"][1] == "raises RuntimeError: ptxas: unknown instruction"
    assert all(results[name][1] == "does not return within 5 s" for name in GROUPS[1])
    assert len(started) == len(GROUPS) and all(process.poll() is not None for process in started)
    assert time.monotonic() - start < 100


def test_an_interrupt_ends_the_processes(monkeypatch):
    def interrupt(child, ends):
        raise KeyboardInterrupt

    started = recorded_processes(monkeypatch)
    monkeypatch.setattr(parent._Child, "is_running", interrupt)
    with pytest.raises(KeyboardInterrupt):
        parent.run_checks(DEVICE)
    assert len(started) == len(GROUPS) and all(process.poll() is not None for process in started)


@pytest.mark.parametrize("code, detail", [("raise OSError('busy')", "OSError: busy"), ("exit(3)", "exit code 3")])
def test_a_process_that_never_reaches_the_gpu_says_nothing_about_the_kernels(code, detail, monkeypatch, caplog):
    class Broken(parent._Child):
        def __init__(self, device, names):
            super().__init__(device, names)
            self.command = [sys.executable, "-c", code]

    monkeypatch.setattr(parent, "_Child", Broken)
    replace()
    assert not REPLACED and not parent.read_cache()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "could not run" in warning and detail in warning


def test_the_objective_and_the_views_take_their_twins_with_one_warning(monkeypatch, caplog):
    faults = {**GOOD, "nearest": ["failed", "index deviates"], "gather_views": ["failed", "does not return"]}
    calls = checking(monkeypatch, faults)
    config = Config().replace(loss_impl="triton")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        replace()
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        for part in ("nearest: index deviates; gather_views: does not return", "fastirt env", "--self-check off"):
            assert part in warning
        assert build_objective(config, 8, torch.float32, torch.device("cpu")).impl == "reference"
    assert calls == ["cuda:0"]
    seen = []
    monkeypatch.setattr(gather, "triton_or_reference", lambda impl, device: seen.append(impl) or "reference")
    ones = torch.ones(1, dtype=torch.int64)
    arguments = torch.arange(12).byte(), ones * 0, ones * 2, torch.zeros(1, 4, dtype=torch.int64)
    table = torch.arange(256).byte()[:, None].repeat(1, 3)
    gather_views(torch.empty(1, 2, 2, 3, dtype=torch.uint8), *arguments, table)
    replace(self_check="off")
    gather_views(torch.empty(1, 2, 2, 3, dtype=torch.uint8), *arguments, table)
    assert seen == ["reference", "auto"] and not REPLACED


def test_one_faulty_kernel_leaves_the_other_part_alone(monkeypatch):
    checking(monkeypatch, {**GOOD, "gather_views": ["failed", "x"], "count_similarities": ["failed", "y"]})
    replace()
    assert build_objective(Config(), 8, torch.float32, torch.device("cpu")).impl == "auto"


def test_results_hold_for_one_machine_and_one_code(monkeypatch, caplog):
    calls = checking(monkeypatch, GOOD)
    replace()
    monkeypatch.setattr(parent, "machine_key", lambda device: "a GPU, driver 2")
    replace()
    replace()
    assert len(calls) == 2 and list(parent.read_cache()) == ["a GPU, driver 1", "a GPU, driver 2"]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    for damage in ("[]", "{", json.dumps({"a GPU, driver 2": {}})):
        parent.cache_file().write_text(damage)
        replace()
    assert len(calls) == 5


def test_a_cache_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    calls = checking(monkeypatch, GOOD)
    replace()
    replace()
    assert len(calls) == 2


def test_nothing_runs_on_a_cpu_or_with_the_check_off(monkeypatch):
    calls = checking(monkeypatch, GOOD)
    replace("cpu")
    replace(self_check="off")
    assert not calls and not parent.cache_file().exists()


def test_all_ranks_follow_the_first(monkeypatch, caplog):
    calls = checking(monkeypatch, GOOD)
    verdict = {**GOOD, "pair_grad": ["failed", "gradient deviates"]}
    host = SimpleNamespace(run_on_main=lambda work: verdict)
    for device in ("cuda:1", "cpu"):
        replace(device, SimpleNamespace(is_distributed=True, is_main=False, host=host))
        assert REPLACED == {"pair_grad"}
    assert not calls and not caplog.records


def test_a_check_that_breaks_ends_no_run(monkeypatch, caplog):
    def broken(device):
        raise OSError("no space left")

    monkeypatch.setattr(parent, "run_checks", broken)
    replace()
    assert "no space left" in caplog.text and not REPLACED


def test_env_shows_the_results(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parent.describe_cache() == "not run"
    checking(monkeypatch, {**GOOD, "nearest": ["failed", "index deviates"]})
    replace()
    assert parent.describe_cache().startswith("6 of 7 kernels pass; nearest: index deviates (20")


def test_commands_check_before_the_first_use_and_the_option_changes_no_figure(trained_run, monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "replace_faulty_kernels", lambda config, ranks: seen.append(config.run.self_check))
    (trained_run / "metrics.json").unlink()
    assert run_cli("evaluate", trained_run, "--device", "cpu", "--self-check", "off") == 0
    assert seen == ["off"] and read_metrics(trained_run)


def test_the_option_may_change_between_runs(tmp_path):
    check_compatible(Config().replace(self_check="off"), Config(), tmp_path)


def test_rounding_cannot_change_a_pair_or_a_neighbor_of_the_batch():
    batch = small_batch(torch.device("cpu"))
    valid, filled = batch.labels >= 0, batch.memory_labels >= 0
    z, labels = batch.z[valid], batch.labels[valid]
    inner = (z @ z.T).fill_diagonal_(-1)
    best = inner.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 0.05
    for s, columns in ((inner, labels), (z @ batch.memory[filled].T, batch.memory_labels[filled])):
        same = labels[:, None] == columns
        assert (s[~same] - 0.5).abs().min() > 0.05
        assert (s[~same] > 0.5).sum() > 100 and same.sum() > 100


def test_values_that_are_not_numbers_deviate():
    right = torch.ones(3)
    assert deviation({"x": right * 1.01}, {"x": right}) is None
    assert "x deviates" in deviation({"x": right * float("nan")}, {"x": right})
    assert "x deviates" in deviation({"x": torch.tensor([2, 3])}, {"x": torch.tensor([2, 2])})
