"""MLflow: a tracking server, or files in the run's folder."""

from __future__ import annotations

import logging
import os
import time
from typing import Any
from urllib.parse import urlsplit

from fastirt.config.options import flatten
from fastirt.training.trackers.interface import Row, TrackedRun
from fastirt.training.trackers.tracker_ids import read_ids, write_ids

log = logging.getLogger("fastirt")

LONGEST_PARAM = 6000  # characters of a value; 500 in versions before 2.8
PARAMS_AT_ONCE = 100


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (default: fastirt) at MLFLOW_TRACKING_URI.

    Without a URI it is a folder of the run. A resumed run goes on under its id, which the run's
    folder keeps. MLflow allows no `@` in names: recall@1 is called recall_at_1.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self._client: Any = None
        self._id = ""

    def start(self) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.run.files.mlflow.absolute().as_uri()
        if urlsplit(uri).scheme in ("", "file"):
            # Since 3.7 MLflow refuses folders without it; a database needs the whole of MLflow.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=uri)
        before = read_ids(self.run.files, "mlflow")
        if before.get("uri") == uri and "id" in before:
            try:
                self._id = self._client.get_run(before["id"]).info.run_id
                self._client.update_run(self._id, status="RUNNING")
            except MlflowException as error:  # deleted since
                log.warning("--tracker mlflow: run %s is gone (%s): a new one begins", before["id"], error.error_code)
                self._id = ""
        if not self._id:
            self._id = self._client.create_run(self._experiment(), run_name=self.run.name).info.run_id
            self._log_config()
        write_ids(self.run.files, "mlflow", {"id": self._id, "uri": uri})
        log.info("MLflow: run %s in %s", self._id, uri)

    def log(self, group: str, row: Row) -> None:
        self._log_numbers(group, row, row["step"])

    def finish(self, metrics: Row, finished: bool) -> None:
        self._log_numbers("final", metrics, self.run.config.optim.max_iter)
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fastirt"
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self._client.create_experiment(name)

    def _log_config(self) -> None:
        from mlflow.entities import Param

        options = flatten(self.run.config.to_dict())
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in options.items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + PARAMS_AT_ONCE])

    def _log_numbers(self, group: str, row: Row, step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        numbers = [
            Metric(f"{group}/{name.replace('@', '_at_')}", float(value), now, step)
            for name, value in row.items()
            if name != "step"
        ]
        if numbers:
            self._client.log_batch(self._id, metrics=numbers)
