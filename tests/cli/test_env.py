"""`fastirt env`: a line for each package and the machine, also where one is missing or broken."""

import re

import numpy as np

import fastirt.env

NAMES = "fastirt Python OS cores memory GPU torch CUDA cuDNN triton timm DALI faiss numpy apex".split()


def test_env_reports_and_survives_missing_and_broken_packages(monkeypatch):
    report = fastirt.env.report()
    for name in NAMES:
        assert re.search(rf"^{name}\b.*:\s+\S", report, re.MULTILINE), name
    assert np.__version__ in report
    assert "failed" not in report

    def nothing(*args):
        raise fastirt.env.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(fastirt.env.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fastirt.env.importlib.metadata, "version", nothing)
    monkeypatch.setattr(fastirt.env.importlib.metadata, "distributions", lambda: [])
    monkeypatch.setenv("PATH", "")
    bare = fastirt.env.report()
    assert bare.count("not installed") >= 9
    assert "commit" not in bare
    assert len(bare.splitlines()) == len(report.splitlines())

    def broken(name):
        raise OSError("libcudart.so.99: cannot open\nshared object")

    monkeypatch.setattr(fastirt.env.importlib.util, "find_spec", broken)
    worse = fastirt.env.report()
    assert "libcudart.so.99" in worse
    assert len(worse.splitlines()) == len(report.splitlines())
