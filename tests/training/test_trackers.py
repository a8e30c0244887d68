"""Trackers: what W&B, MLflow and TensorBoard hold after a run, and trackers that fail."""

import json
import struct
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from fastirt.config.options import Config
from fastirt.config.run_files import RunFiles
from fastirt.training import trackers
from fastirt.training.trackers import TrackedRun, Trackers, guard
from tests.helpers import last_line, loss_rows, read_log, read_metrics, run_cli, train_few

# ---- what the libraries hold


def wandb_records(run):
    """The records of all offline files of a run: LevelDB's log format around protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        data, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768  # the rest of a block
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def wandb_numbers(run, name):
    """(step, value) of a number, from all files of the run."""
    rows = []
    for record in wandb_records(run):
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if name in row:
                rows.append((row["step"], row[name]))
    return rows


@pytest.fixture(scope="module")
def tracked(image_folder, tmp_path_factory):
    """A run of six steps with all trackers, resumed for two more."""
    run, patch = tmp_path_factory.mktemp("tracked") / "run", pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    patch.setattr(guard, "START_TIMEOUT", 300)  # of a busy machine
    patch.setattr(guard, "FINISH_TIMEOUT", 300)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_RUN_ID"):
        patch.delenv(name, raising=False)
    try:
        names = "--tracker tensorboard wandb mlflow".split()
        assert train_few(image_folder, run, *names) == 0
        assert run_cli("train", "--resume", run, "--max-iter", "8") == 0
        yield run
    finally:
        patch.undo()


def test_wandb_offline_holds_the_rows_under_one_id(tracked):
    expected = [(row["step"], row["loss"]) for row in loss_rows(tracked)]
    assert wandb_numbers(tracked, "train/loss") == expected and len(expected) == 4
    assert wandb_numbers(tracked, "eval/recall@1")[-1] == (8, read_metrics(tracked)["recall@1"])
    started = [record.run for record in wandb_records(tracked) if record.HasField("run")]
    assert len({run.run_id for run in started}) == 1 and started[0].project == "fastirt"
    summary = {
        item.key or ".".join(item.nested_key) for record in wandb_records(tracked) for item in record.summary.update
    }
    assert "final/recall@1" in summary
    config = {item.key for item in started[0].config.update}
    assert {"lr", "max_iter", "method"} <= config


def test_mlflow_files_hold_one_run_that_went_on(tracked):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tracked / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fastirt").experiment_id])
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert losses == [(row["step"], row["loss"]) for row in loss_rows(tracked)]
    assert run.data.params["lr"] == "0.001" and run.data.params["model"].startswith("vit_tiny")
    assert run.data.metrics["final/recall_at_1"] == read_metrics(tracked)["recall@1"]
    assert run.info.status == "FINISHED"


def test_tensorboard_holds_the_rows(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], row["loss"]) for row in loss_rows(tracked)]


def test_wandb_without_a_key_writes_offline_and_asks_nothing(tmp_path, monkeypatch, caplog):
    import wandb

    from fastirt.training.trackers.wandb import WeightsAndBiases

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tracker = WeightsAndBiases(tracked_run(tmp_path))
    settings = SimpleNamespace(mode="online", api_key=None, base_url="https://api.wandb.ai")
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    assert tracker._mode(wandb) == "offline"
    assert "no API key" in caplog.text
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert tracker._mode(wandb) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracker._mode(wandb) is None


# ---- trackers that fail


class Fake:
    """A tracker that raises, or blocks, in one of its calls."""

    fails_in, blocks, rows, ends = "", False, [], []

    def __init__(self, run):
        pass

    def _do(self, name):
        if self.fails_in == name and self.blocks:
            threading.Event().wait(20)
        if self.fails_in == name:
            raise SystemExit("no more")

    def start(self):
        self._do("start")

    def log(self, group, row):
        self._do("log")
        Fake.rows.append((group, dict(row)))

    def finish(self, metrics, finished):
        self._do("finish")
        Fake.ends.append((dict(metrics), finished))


class Good(Fake):
    pass


class Bad(Fake):
    pass


@pytest.fixture
def fakes(monkeypatch):
    """`good` and `bad` in place of W&B and MLflow; a tenth of a second until they are left."""
    monkeypatch.setattr(Fake, "rows", [])
    monkeypatch.setattr(Fake, "ends", [])
    for name, kind in (("wandb", "Good"), ("mlflow", "Bad")):
        monkeypatch.setitem(trackers.KINDS, name, trackers.Kind(__name__, kind, "json", ""))
    monkeypatch.setattr(guard, "START_TIMEOUT", 0.1)
    monkeypatch.setattr(guard, "FINISH_TIMEOUT", 0.1)
    return Bad


def tracked_run(path):
    return TrackedRun(RunFiles(path), Config(), 0)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(fakes, tmp_path, monkeypatch, caplog, blocks):
    monkeypatch.setattr(Bad, "blocks", blocks)
    for call in ("start", "log", "finish"):
        caplog.clear()
        Fake.rows.clear(), Fake.ends.clear()
        monkeypatch.setattr(Bad, "fails_in", call)
        begin = time.monotonic()
        both = Trackers(["mlflow", "wandb"], tracked_run(tmp_path))
        for step in (1, 2):
            both.log("train", {"step": step, "loss": 0.5})
        both.close({"recall@1": 0.5, "map": float("nan")})
        both.close()
        assert time.monotonic() - begin < 2
        assert Fake.rows.count(("train", {"step": 2, "loss": 0.5})) == (2 if call == "finish" else 1)
        assert Fake.ends == [({"recall@1": 0.5}, True)]
        (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert "--tracker mlflow" in warning, call


def test_a_run_whose_trackers_fail_or_block_ends_as_any_other(image_folder, finished_run, fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(Bad, "fails_in", "log")
    monkeypatch.setattr(Good, "fails_in", "finish")
    monkeypatch.setattr(Good, "blocks", True)
    assert train_few(image_folder, tmp_path / "run", "--tracker", "wandb", "mlflow") == 0
    assert [row["loss"] for row in loss_rows(tmp_path / "run")] == [row["loss"] for row in loss_rows(finished_run)]
    assert not (tmp_path / "run/tensorboard").exists()
    assert [group for group, _ in Fake.rows] == ["train", "train", "train", "eval"]


def test_a_stopped_run_is_not_called_finished(fakes, tmp_path):
    Trackers(["wandb"], tracked_run(tmp_path)).close()
    assert Fake.ends == [({}, False)]


def test_none_writes_the_log_alone(image_folder, tmp_path, capsys):
    assert train_few(image_folder, tmp_path / "run", "--tracker", "none") == 0
    assert not (tmp_path / "run/tensorboard").exists() and len(read_log(tmp_path / "run")) == 4
    assert train_few(image_folder, tmp_path / "two", "--tracker", "none", "wandb") == 2
    assert "none stands alone" in last_line(capsys)


def test_a_missing_library_is_one_line_before_the_data_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_few(tmp_path / "nothing there", tmp_path / "run", "--tracker", "tensorboard", "wandb") == 2
    assert "--tracker wandb: needs wandb: pip install 'fastirt[wandb]'" in last_line(capsys)
    assert not (tmp_path / "run").exists()
