"""`--profile`: where the time of a step went, in a run that trains as any other."""

import json
import logging

import pytest

from fastirt.step.train_step import PHASES
from tests.helpers import read_log, train_tiny


def run(image_folder, folder, *flags):
    return train_tiny(image_folder, folder, *"--batch-size 8 --rank 1 --logging-freq 4".split(), *flags)


def test_a_profile_names_where_the_time_went(image_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fastirt"):
        assert run(image_folder, tmp_path / "run", "--profile", "4", "--max-iter", "12") == 0
    lines = [r.getMessage().removeprefix("profile: ") for r in caplog.records if r.getMessage().startswith("profile")]
    total = float(lines[0].split()[0])
    spent = {line[:10].strip(): float(line[10:].split()[0]) for line in lines[1:-1]}
    assert list(spent) == ["input wait", *PHASES, "other"]
    assert sum(spent.values()) == pytest.approx(total, rel=0.5)
    assert "most of it is" in lines[-1]
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 4


def test_a_profiled_run_trains_as_any_other(image_folder, tmp_path):
    logs = []
    for name, flags in (("plain", []), ("profiled", ["--profile", "3"])):
        assert run(image_folder, tmp_path / name, "--max-iter", "12", *flags) == 0
        logs.append([row.get("loss", row.get("recall@1")) for row in read_log(tmp_path / name)])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4


def test_a_run_too_short_to_profile_says_so(image_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fastirt"):
        assert run(image_folder, tmp_path / "run", "--profile", "9", "--max-iter", "6") == 0
    assert "--profile" in caplog.text
    assert "ended before" in caplog.text
    assert not (tmp_path / "run" / "trace.json").exists()
