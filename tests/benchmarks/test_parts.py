"""The parts of the benchmark suite end to end on the CPU: every figure has its limit beside it."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import PARTS, WITHOUT_CEILINGS
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.parts import cache, step
from benchmarks.results import Results, read
from tests.benchmarks.small import LIMITS, QUICK, SMALL


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if part not in WITHOUT_CEILINGS])
def test_a_part_end_to_end(part, tmp_path, image_folder):
    out = tmp_path / "results" / "here.jsonl"
    flags, names = SMALL[part]
    words = flags.split() + (sorted(names) if flags.endswith("--only") else [])
    words += ["--data-path", str(image_folder)] if part == "embed" else []  # not rendered, which takes seconds
    assert benchmarks_main([part, *words, *QUICK, "--out", str(out)]) == 0
    rows = read([out])
    figures = [row for row in rows if "not_run" not in row]
    assert {row["name"] for row in figures if row["part"] == part} == names
    assert {row["name"] for row in figures if row["part"] == "ceilings"} == {"GB/s", "bf16", "tf32", "fp32"}
    for row in figures:
        assert row["device"].startswith("CPU")
        assert row["versions"]["torch"] == torch.__version__
        assert row["commit"]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        if row["limit"]:
            shares = sorted((row["p50"] / row["limit"], row["limit"] / row["p50"]))
            assert row["share_of_limit"] in (pytest.approx(shares[0]), pytest.approx(shares[1]))
        is_limit = row["name"].startswith(("decode alone", "encoder alone")) or row["part"] == "ceilings"
        assert row["limit"] or part == "scaling" or is_limit
    if part in ("cache", "step"):
        # what needs a GPU is listed
        assert any(row["part"] == part for row in rows if "not_run" in row)


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
        ("cache loss --queries 5", "--queries 5: none of cache, loss"),
        ("cache loss 7", "7: none of cache, loss"),
        ("cache attention --batch-size 2 3", "unrecognized arguments: 3"),
        ("cache loss --rows x", "argument --rows: invalid int value: 'x'"),
        ("cache nothing", "unrecognized arguments: nothing"),
        ("all --rows 5", "unrecognized arguments: --rows 5"),
    ],
)
def test_flags_of_several_parts_that_are_wrong(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmarks_main(words.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.compile
def test_dynamo_may_compile_as_often_as_there_are_contenders():
    before, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 8
    try:
        assert benchmarks_main(["cache", *SMALL["cache"][0].split(), *QUICK, "--no-save"]) == 0
        assert torch._dynamo.config.recompile_limit > 1000
    finally:
        torch._dynamo.config.recompile_limit = before


def test_a_cache_s_random_bytes_do_not_repeat_with_its_images():
    pixels = torch.zeros(3 * cache.TILE // 2, dtype=torch.uint8)
    cache.fill(pixels)
    assert (pixels[cache.TILE :] == pixels[: cache.TILE // 2 - 1 + cache.TILE % 2]).all()
    assert (pixels != 0).float().mean() > 0.99 and cache.TILE % (256 * 256 * 3)


@pytest.mark.slow
def test_all_goes_on_after_a_part_that_fails(tmp_path, monkeypatch, capsys):
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

    for name in PARTS:
        monkeypatch.setitem(sys.modules, f"benchmarks.parts.{name}", Part(name))
    out = tmp_path / "all.jsonl"
    assert benchmarks_main(["all", *QUICK, "--out", str(out)]) == 1
    assert ran == [(name, 7, True) for name in PARTS]
    assert [row["not_run"] for row in read([out]) if "not_run" in row] == ["RuntimeError: no luck"]


def test_unknown_part(capsys):
    with pytest.raises(SystemExit) as caught:
        benchmarks_main(["nothing"])
    assert caught.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err


def test_the_readme_s_example_of_a_part_runs():
    readme = Path(step.__file__).parent.parent / "README.md"
    part = {}
    exec(readme.read_text().split("```python\n")[1].split("```")[0], part)
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int)
    part["add_flags"](parser)
    results = Results(None, torch.device("cpu"), LIMITS)
    part["run"](parser.parse_args("--rows 64 --repeats 2".split()), results)
    assert [figure.name for figure in results.figures] == ["F.normalize", "definition"]
    assert all(figure.limit > 0 and figure.params == {"rows": 64} for figure in results.figures)
