"""The table beside published rows, and metrics.json."""

import json
import os

import pytest

from fastirt.config.options import Config
from fastirt.errors import UserError
from fastirt.retrieval.compare_runs import compare_runs
from fastirt.retrieval.published_results import PAPER, PUBLIC, PUBLISHED, PUBLISHED_RANKS
from fastirt.retrieval.report import table, write_metrics

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
    assert cells(other[2])[place] == "75.00"
    assert all(cells(line)[place] == "" for line in other[3:-1])


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
    with pytest.raises(UserError, match="metrics.json: .*No space left"):
        write_metrics(path, {"recall@1": 0.0})
    assert json.loads(path.read_text()) == METRICS and os.listdir(tmp_path) == ["metrics.json"]


@pytest.fixture
def make_run(tmp_path):
    def make(name, recall, **options):
        (tmp_path / name).mkdir()
        write_metrics(tmp_path / name / "metrics.json", {**METRICS, "recall@1": recall})
        if options:
            tree = {"config": Config().replace(**options).to_dict()}
            (tmp_path / name / "config.json").write_text(json.dumps(tree))
        return tmp_path / name

    return make


def report(*runs, **rest):
    lines = [cells(line) for line in compare_runs(runs, **rest).splitlines()]
    return lines[0], lines[2:]


def test_runs_that_differ_get_a_column_for_it_and_no_other(make_run):
    a = make_run("a", 0.5, method="irt-r", lambda_reg=0.7)
    b = make_run("b", 0.6, method="irt-l", lambda_reg=0.0)
    header, rows = report(a, b)
    assert header == ["run", "method", "λ", "recall@1 %", "recall@10 %", "map@r %"]
    assert rows == [
        ["a", "irt-r (paper)", "0.7", "50.00", "80.00", "30.00"],
        ["b", "irt-l (paper)", "0", "60.00", "80.00", "30.00"],
    ]
    assert report(a, a)[0][1:3] == ["method", "recall@1 %"]


def test_every_column_of_runs_that_differ_in_all(make_run):
    a = make_run(
        "a", 0.5, model="x", dataset="csv", data_path="/d/mine", input_size=384, max_iter=10, recipe="unofficial"
    )
    b = make_run("b", 0.6, model="y", dataset="sop", data_path="/d/SOP", lambda_reg=0.3, seed=1)
    bare = make_run("histogram", 0.4)
    header, rows = report(a, b, bare)
    assert header[2:9] == ["data set", "model", "size", "recipe", "λ", "steps", "seed"]
    assert rows[0][1:9] == ["irt-r", "csv mine", "x", "384", "unofficial", "0.7", "10", "0"]
    assert rows[1][1:9] == ["irt-r", "sop", "y", "224", "paper", "0.3", "2000", "1"]
    assert rows[2][1:9] == [""] * 8


def test_a_run_without_training_adds_no_columns_of_training(make_run):
    off_the_shelf = make_run("o", 0.4, method="irt-o", max_iter=0)
    trained = [make_run(name, 0.5, method="irt-r", lambda_reg=weight, m=4) for name, weight in (("a", 0.3), ("b", 0.7))]
    header, rows = report(off_the_shelf, *trained)
    assert header[:4] == ["run", "method", "λ", "steps"] and header[4] == "recall@1 %"
    assert [row[2:4] for row in rows] == [["", "0"], ["0.3", "2000"], ["0.7", "2000"]]
    momentum = make_run("c", 0.5, method="irt-r", lambda_reg=0.3, m=4, encoder_momentum=0.999)
    other = make_run("d", 0.5, method="irt-r", lambda_reg=0.3, m=4)
    assert [row[2] for row in report(other, momentum)[1]] == ["none", "0.999"]
    assert ":" not in [cell.strip() for cell in compare_runs([*trained, momentum]).splitlines()[1].split("|")]


def test_sorted_by_any_column(make_run):
    runs = [make_run("a", 0.5, seed=3), make_run("b", 0.7, seed=1), make_run("c", 0.6)]
    assert [row[0] for row in report(*runs, sort="recall@1")[1]] == ["b", "c", "a"]
    assert [row[0] for row in report(*runs, sort="Seed")[1]] == ["a", "b", "c"]
    assert [row[0] for row in report(*runs, sort="run")[1]] == ["a", "b", "c"]
    bare = make_run("none", 0.9)
    assert [row[0] for row in report(bare, *runs[:2], sort="seed")[1]][-1] == "none"
    with pytest.raises(UserError, match="--sort speed: .*recall@1"):
        compare_runs(runs, sort="speed")


def test_whatever_else_changes_figures_gets_a_column_under_its_own_name(make_run, tmp_path):
    """Also two data sets of one name, and weights from different runs."""
    a = make_run("a", 0.5, dataset="csv", data_path="/d/A/split.csv", weights="/runs/one/model.safetensors", max_iter=0)
    b = make_run("b", 0.6, dataset="csv", data_path="/d/B/split.csv", resize="shorter", max_iter=0)
    header, rows = report(a, b)
    assert header[2:5] == ["data set", "weights", "resize"]
    assert rows[0][2:5] == ["csv A/split.csv", "one/model.safetensors", "square"]
    assert rows[1][2:5] == ["csv B/split.csv", "timm", "shorter"]
    kinds = (("c", "anchor_sum"), ("d", "nonzero_mean"))
    runs = [make_run(name, 0.5, dataset="folder", data_path="/d/mine", contrastive=kind) for name, kind in kinds]
    for run, digest in zip(runs, ("123456789", "abcdefghi")):
        tree = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**tree, "images": {"evaluated": digest}}))
    header, rows = report(*runs)
    assert header[2:4] == ["data set", "contrastive"]
    assert [row[2] for row in rows] == ["folder mine 123456", "folder mine abcdef"]


def test_what_is_no_run_is_refused(make_run):
    run = make_run("a", 0.5)
    for content in ("[1]", '{"recall@1": null}', "{"):
        (run / "metrics.json").write_text(content)
        with pytest.raises(UserError, match="metrics.json"):
            compare_runs([run])
    with pytest.raises(UserError, match="cannot be read"):
        compare_runs([run / "metrics.json"])


def test_numbers_are_sorted_beside_words(make_run):
    values = (("a", None), ("b", 0.99), ("c", 0.999))
    runs = [make_run(name, 0.5, method="irt-r", encoder_momentum=value) for name, value in values]
    assert [row[0] for row in report(*runs, sort="momentum")[1]] == ["c", "b", "a"]


def test_published_rows_are_complete_and_stand_beside_a_run():
    assert {name: len(rows) for name, rows in PUBLISHED.items()} == {"sop": 8, "cub200": 8, "inshop": 8}
    metrics = {
        "recall@1": 0.7,
        "recall@2": 0.8,
        "recall@4": 0.9,
        "recall@8": 0.95,
        "map@r": 0.3,
        "r_precision": 0.4,
        "queries": 5924,
        "gallery": 5924,
        "unmatched": 2,
        "bad": 1,
    }
    text = table(metrics, "cub200", "irt-r", "deit_small_patch16_224", "paper")
    lines = text.splitlines()
    assert len(lines) == 2 + 1 + 8 + 1 and len({len(line) for line in lines[:-1]}) == 1
    assert "70.00" in lines[2]
    assert "73.73" in text
    assert "94.65" in text
    assert "2 queries without a match" in text and "1 unreadable" in text
    assert len(table(metrics, "folder", "irt-o", "m", "paper").splitlines()) == 4


def test_runs_side_by_side(tmp_path):
    for name, value in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        write_metrics(tmp_path / name / "metrics.json", {"recall@1": value, "map@r": 0.1, "queries": 3})
    (tmp_path / "b/config.json").write_text(json.dumps({"config": {"method": "irt-l", "recipe": "paper"}}))
    text = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert "25.00" in text and "irt-l (paper)" in text
    with pytest.raises(UserError, match="no metrics.json"):
        compare_runs([tmp_path])


def test_intervals_stand_beside_their_metrics(make_run, tmp_path):
    """Runs of earlier versions have none."""
    old, new = make_run("a", 0.5, seed=1), make_run("b", 0.6, seed=2)
    assert report(old, old)[0][-3:] == ["recall@1 %", "recall@10 %", "map@r %"]
    intervals = {
        "ci95_low_recall@1": 0.58,
        "ci95_high_recall@1": 0.6199,
        "ci95_low_map@r": 0.29,
        "ci95_high_map@r": 0.31,
    }
    write_metrics(new / "metrics.json", {**METRICS, "recall@1": 0.6, **intervals})
    header, rows = report(old, new, sort="recall@1")
    assert header[3:] == ["recall@1 %", "recall@1 95 % CI", "recall@10 %", "map@r %", "map@r 95 % CI"]
    assert [row[0] for row in rows] == ["b", "a"]
    assert [row[4] for row in rows] == ["58.00-61.99", ""] and rows[0][-1] == "29.00-31.00"


def test_notes_below_the_table(make_run):
    more = {"map": 0.4567, "mrr": 0.8, "minp": 0.1, "median_rank": 1.5, "ci95_low_map@r": 0.29, "ci95_high_map@r": 0.31}
    lines = table({**METRICS, **more}, "folder", "irt-o", "m", "paper", "class").splitlines()
    assert lines[3].endswith("60,502 gallery images; means over classes")
    assert lines[4] == "95 % intervals: map@r 29.00-31.00 %"
    assert lines[5:] == ["mAP 45.67 %, MRR 80.00 %, mINP 10.00 %, median rank 1.5"]
