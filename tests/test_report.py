"""The table beside published rows, and metrics.json."""

import json
import os

import pytest

from fastirt.errors import UserError
from fastirt.retrieval.report import PAPER, PUBLIC, PUBLISHED, PUBLISHED_RANKS, table, write_metrics

METRICS = {"recall@1": 0.7, "recall@10": 0.8, "map@r": 0.3, "r_precision": 0.4, "queries": 60502, "gallery": 60502}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("recipe, order", [("paper", [PAPER, PUBLIC]), ("unofficial", [PUBLIC, PAPER])])
@pytest.mark.parametrize(
    "model, name",
    [("deit_small_patch16_224", "DeiT-S"), ("deit_small_distilled_patch16_224.fb_in1k", "DeiT-S distilled")],
)
def test_what_a_run_compares_with_stands_right_under_it(model, name, recipe, order):
    lines = table(METRICS, "sop", "irt-r", model, recipe).splitlines()
    assert cells(lines[2]) == [f"this run ({recipe})", "irt-r", model, "70.00", "80.00", "30.00", "40.00"]
    assert [cells(line)[:3] for line in lines[3:5]] == [[source, "irt-r", name] for source in order]
    assert len(lines) == 2 + 1 + 8 + 1


def test_published_figures_are_printed_as_published_and_only_at_their_own_ranks():
    published = table(METRICS, "sop", "irt-o", "x", "paper").splitlines()[3:-1]
    lines = {tuple(cells(line)[:3]): cells(line)[3:] for line in published}
    assert lines[PAPER, "irt-r", "DeiT-S"] == ["84.0", "93.6", "", ""]
    assert lines[PAPER, "irt-o", "DeiT-S"] == ["52.8", "", "", ""]
    assert lines[PUBLIC, "irt-r", "DeiT-S distilled"] == ["82.70", "92.85", "", ""]
    other = table({**METRICS, "recall@3": 0.75}, "sop", "irt-o", "x", "paper").splitlines()
    place = cells(other[0]).index("recall@3 %")
    assert cells(other[2])[place] == "75.00" and all(cells(line)[place] == "" for line in other[3:-1])


def test_published_rows_rise_with_k_and_fit_their_ranks():
    for dataset, rows in PUBLISHED.items():
        for row in rows:
            assert len(row.recalls) in (1, 4) and list(row.recalls) == sorted(row.recalls)
            assert len(PUBLISHED_RANKS[dataset]) == 4


def test_metrics_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_metrics(path, METRICS)
    assert json.loads(path.read_text()) == METRICS

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="metrics.json: cannot be written .No space left"):
        write_metrics(path, {"recall@1": 0.0})
    assert json.loads(path.read_text()) == METRICS and os.listdir(tmp_path) == ["metrics.json"]
