"""Figures by hand: operations, the model of many ranks, quantiles, launches, failing calls."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.parts import loss, scaling
from benchmarks.results import figure_of
from benchmarks.rounds import counted, kernel_us, run_interleaved
from benchmarks.timing import time_interleaved
from tests.helpers import CPU


def test_the_model_of_many_ranks_by_hand():
    """Links of 1 and 0.1 GB/s, 10 MB of gradients, 1 MB to exchange, 3 rounds of 1 ms a hop in a
    node and 2 between; the backward hides two thirds of a step."""
    links = dict(
        step_ms=30, gradient_bytes=1e7, exchange_bytes=1e6, rounds=3, link_gb_s=1, network_gb_s=0.1,
        link_latency_us=1000, network_latency_us=2000, gpus_per_node=2,
    )  # fmt: skip
    assert scaling.predicted(1, **links) == 30
    assert scaling.predicted(2, **links) == pytest.approx(30 + 1 + 3)  # a ring of 10 ms is hidden
    over_the_network = 30 + (175 - 20) + 70 + 3 * (4 * 2 + 3 * 1)  # there the ring is not hidden
    assert scaling.predicted(8, **links) == pytest.approx(over_the_network)


def test_bytes_and_operations_by_hand():
    """N = 2, M = 3, D = 4, bf16: 5 vectors of 8 bytes with labels of 8 are read twice, 2 gradients
    of 8 bytes are written; 2 x 5 similarities of 4 products and 4 sums in each pass, and as many
    for the weighted sums."""
    assert loss.counts(2, 3, 4, 2) == (2 * 5 * 16 + 2 * 8, 3 * 10 * 8)
    moved, operations = loss.counts(64, 59551, 384, 2)
    assert operations == 6 * 64 * 59615 * 384
    assert moved == 2 * 59615 * (768 + 8) + 64 * 768


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (RuntimeError("cannot be captured\nat all"), "RuntimeError: cannot be captured"),
        (ImportError(""), "ImportError"),
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

    timed, _ = time_interleaved({"works": lambda: None, "fails": failing()}, CPU, repeats=3)
    assert len(timed["works"]) == 3 and timed["fails"] == words
    turns = run_interleaved({"works": lambda: None, "fails": failing()}, CPU, rounds=3, steps=2, warm_up=1)
    assert len(turns["works"].seconds) == 3 and turns["fails"] == words


def test_launches_count_neither_spans_nor_copies_as_kernels():
    def event(key, count, device="CPU", span=False):
        kind = getattr(torch.profiler.DeviceType, device)
        return SimpleNamespace(
            key=key, count=count, device_type=kind, is_user_annotation=span, self_device_time_total=10 * count
        )

    host = {"cudaLaunchKernelExC": 3, "cuLaunchKernel": 2, "cudaGraphLaunch": 1, "aten::mm": 7}
    events = [event(key, count) for key, count in host.items()]
    events += [event("some kernel", 5, "CUDA"), event("Memcpy HtoD (Pinned -> Device)", 2, "CUDA")]
    events += [event("Memset (Device)", 1, "CUDA"), event("Optimizer.step#AdamW.step", 1, "CUDA", span=True)]
    assert counted(events, torch.device("cuda")) == {"launches": 6, "kernels": 5, "copies": 3}
    assert counted(events, CPU) == {"operators": 7}
    assert kernel_us(events) == {"some kernel": 50, "Memcpy HtoD (Pinned -> Device)": 20, "Memset (Device)": 10}


def test_quantiles_and_shares():
    figure = figure_of([1, 2, 3, 4, 5, 6], part="p", name="n", unit="ms", params={}, better="lower", limit=1.75)
    assert (figure.p20, figure.p50, figure.p80, figure.repeats) == (2.0, 3.5, 5.0, 6)
    assert figure.share_of_limit == 0.5
    assert figure_of([4.0], part="p", name="n", unit="imgs/s", params={}, limit=8.0).share_of_limit == 0.5
