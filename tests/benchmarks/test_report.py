"""Comparisons that catch a slow-down; a table and plots from result files alone."""

import json
import random

import pytest

from benchmarks.__main__ import main
from benchmarks.parts import cache
from benchmarks.report import MODEL, plot, table
from benchmarks.results import read
from benchmarks.timing import time_interleaved


def figure(name="fastirt", part="step", p50=100.0, spread=0.02, device="CPU, 2 threads", better="higher", **rest):
    row = dict(part=part, name=name, unit="imgs/s", p20=p50 * (1 - spread), p50=p50, p80=p50 * (1 + spread))
    row |= dict(
        params={"batch_size": 8}, device=device, better=better, commit="abc1234", time="2026-01-02T03:04:05+00:00"
    )
    return {**row, "limit": None, "limit_name": "", "share_of_limit": None, **rest}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_a_result_slowed_down_on_purpose_fails(tmp_path, capsys):
    """A part is measured, then measured again with every call of it done thirty times over."""
    out = tmp_path / "a.jsonl"
    words = "cache --quick --device cpu --images 20 --side 40 --crop 32 --repeats 7".split()
    assert main([*words, "--out", str(out)]) == 0
    assert main(["compare", str(out), str(out)]) == 0

    def slowed(calls, *rest, **more):
        slow = {name: lambda call=call: [call() for _ in range(30)] for name, call in calls.items()}
        return time_interleaved(slow, *rest, **more)

    kept, cache.time_interleaved = cache.time_interleaved, slowed
    try:
        assert main([*words, "--out", str(tmp_path / "b.jsonl")]) == 0
    finally:
        cache.time_interleaved = kept
    capsys.readouterr()
    assert main(["compare", str(out), str(tmp_path / "b.jsonl")]) == 1
    assert "FELL" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "b.jsonl"), str(out)]) == 0  # faster is no fault


@pytest.mark.parametrize(
    "change, spread, code",
    [(0.97, 0.05, 0), (0.9, 0.02, 1), (0.85, 0.2, 0), (0.985, 0.0, 0), (0.97, 0.0, 1), (2, 0, 0)],
)
def test_noise_decides(tmp_path, change, spread, code):
    a = write(tmp_path / "a", figure(spread=spread))
    b = write(tmp_path / "b", figure(p50=100 * change, spread=spread))
    assert main(["compare", a, b]) == code


def test_milliseconds_fall_by_growing(tmp_path, capsys):
    a = write(tmp_path / "a", figure(better="lower", unit="ms"), figure("other"))
    b = write(tmp_path / "b", figure(better="lower", unit="ms", p50=130.0))
    assert main(["compare", a, b]) == 1
    assert "is missing in" in capsys.readouterr().out
    assert main(["compare", b, a]) == 0


def test_the_last_of_several_counts_and_ceilings_never(tmp_path):
    a = write(tmp_path / "a", figure(p50=500), figure(), figure(part="ceilings", p50=50))
    b = write(tmp_path / "b", figure(p50=1), figure(), figure(part="ceilings", p50=10))
    assert main(["compare", a, b]) == 0


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    a = write(tmp_path / "a", figure())
    for b in (
        write(tmp_path / "b", figure(device="CPU, 8 threads")),
        str(tmp_path / "none"),
        write(tmp_path / "c", {"part": 1}),
    ):
        assert main(["compare", a, b]) == 2
        err = capsys.readouterr().err
        assert err.startswith("compare: error: ") and err.count("\n") == 1


def test_a_line_cut_off_is_left_out_and_damage_named(tmp_path):
    path = tmp_path / "a"
    path.write_text(json.dumps(figure()) + "\n" + json.dumps(figure())[:40])
    assert len(read([path])) == 1
    path.write_text(json.dumps(figure())[:40] + "\n" + json.dumps(figure()) + "\n")
    with pytest.raises(ValueError, match="a, line 1: not a result"):
        read([path])


def test_the_report_fills_the_readme_and_draws_the_same_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [figure(), figure("public recipe", p50=20.0, limit=400.0, limit_name="fp32 products", share_of_limit=0.05)]
    rows += [figure(time="2026-02-02T00:00:00+00:00", p50=123.0), figure(part="loss", unit="ms", better="lower")]
    rows += [{**figure(part="loss", name="kernels"), "not_run": "needs a GPU"}]
    random.Random(0).shuffle(rows)
    results, readme = write(tmp_path / "r.jsonl", *rows), tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    plots = []
    for folder in ("one", "two"):
        assert main(["report", results, "--readme", str(readme), "--plots", str(tmp_path / folder)]) == 0
        plots.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    # its rows are of two days, the loss's of one
    assert "**step** (CPU, 2 threads; batch size 8)\n\n|" in text
    assert "| fastirt (commit abc1234, 2026-02-02) |" in text
    assert "**loss** (CPU, 2 threads; batch size 8, commit abc1234, 2026-01-02)" in text
    assert "| 123 imgs/s" in text and "100 imgs/s (98-102)" not in text  # the newest counts
    assert "5.0 % of 400 imgs/s (fp32 products)" in text
    assert "- loss, kernels (CPU, 2 threads): needs a GPU" in text
    assert plots[0] == plots[1]
    assert set(plots[0]) == {"step-imgs-s-cpu-2-threads.svg", "loss-ms-cpu-2-threads.svg"}
    drawn = {name: data.decode() for name, data in plots[0].items()}
    assert "this machine's limit" in drawn["step-imgs-s-cpu-2-threads.svg"]
    assert "limit" not in drawn["loss-ms-cpu-2-threads.svg"]  # none is drawn there
    readme.write_text("no markers")
    capsys.readouterr()
    assert main(["report", results, "--readme", str(readme)]) == 2
    assert "needs one line <!-- benchmarks -->" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.jsonl")]) == 2


def test_rates_stand_beside_the_time_where_a_part_has_them():
    rates = {"GB/s": 812.4, "TFLOP/s": 1.234}
    rows = [figure(part="loss", extra=rates), figure("plain", part="loss", extra={"peak_bytes": 7}), figure()]
    lines = table(rows).splitlines()
    assert "| | median (p20-p80) | GB/s | TFLOP/s | of the limit here |" in lines
    assert "| fastirt | 100 imgs/s (98-102) | 812 | 1.23 |  |" in lines
    assert "| plain | 100 imgs/s (98-102) |  |  |  |" in lines
    assert "| fastirt | 100 imgs/s (98-102) |  |" in lines  # the step has none


def test_modelled_figures_share_no_table_and_no_plot_with_measured_ones(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        figure(part="scaling", name="memory whole, gloo"),
        figure(part="scaling", name=f"{MODEL}, memory whole", p50=9e5),
    ]
    text = table(rows)
    before, after = text.split("\n## Model, not measured\n")
    assert "memory whole, gloo" in before and "900,000" not in before
    assert "| memory whole | 900,000 imgs/s |" in after
    assert "CPU" not in after
    assert "median" not in after
    (svg,) = plot(rows, tmp_path)
    assert "memory whole, gloo" in svg.read_text() and MODEL not in svg.read_text()
    assert "Model" not in table(rows[:1]) and plot(rows[1:], tmp_path / "none") == []
