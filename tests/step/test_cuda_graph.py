"""What a failed capture leaves behind, with a stand-in for torch's captures."""

import contextlib

import pytest
import torch

from fastirt.step.cuda_graph import captured


@pytest.fixture
def generator_mode(monkeypatch):
    """Whether the default generator is in its capture mode; as in torch 2.11, only a capture that
    succeeds ends it."""
    mode = {"capturing": False}

    @contextlib.contextmanager
    def graph(*_, **__):
        mode["capturing"] = True
        yield
        mode["capturing"] = False

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    return mode


def test_dropout_works_after_a_failed_capture(generator_mode):
    def breaks():
        assert generator_mode["capturing"]
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        captured(breaks, torch.device("cpu"))
    assert not generator_mode["capturing"]


def test_a_device_that_cannot_capture_at_all_names_the_first_cause(generator_mode, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("driver error")

    def body():
        monkeypatch.setattr(torch.cuda, "graph", broken)
        raise RuntimeError("the first cause")

    with pytest.raises(RuntimeError, match="the first cause"):
        captured(body, torch.device("cpu"))
