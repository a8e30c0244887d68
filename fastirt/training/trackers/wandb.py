"""Weights & Biases, also without a network: WANDB_MODE=offline writes into the run's folder."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from typing import Any
from urllib.parse import urlsplit

from fastirt.config.options import flatten
from fastirt.training.trackers.interface import Row, TrackedRun
from fastirt.training.trackers.tracker_ids import read_ids, write_ids

log = logging.getLogger("fastirt")

# Seconds that W&B itself may take; the guard leaves it behind after longer ones.
INIT_TIMEOUT, FINISH_TIMEOUT = 15, 25


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT (default: fastirt).

    A resumed run goes on under its id, which the run's folder keeps; offline the parts of a run
    are several folders of one id, which `wandb sync` puts together.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self._wandb_run: Any = None

    def start(self) -> None:
        import wandb

        before = read_ids(self.run.files, "wandb")
        identity = before.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        mode = self._mode(wandb)
        try:
            self._wandb_run = self._init(wandb, identity, mode)
        except wandb.errors.CommError as error:
            log.warning("--tracker wandb: no connection (%s): writes offline", " ".join(str(error).split())[:200])
            wandb.teardown()  # else its service calls the id in use
            self._wandb_run = self._init(wandb, identity, "offline")
        write_ids(self.run.files, "wandb", {"id": identity, "project": self._wandb_run.project})
        self._wandb_run.define_metric("step")
        self._wandb_run.define_metric("*", step_metric="step")
        if self._wandb_run.settings.mode == "offline":
            folder = os.path.dirname(self._wandb_run.dir)
            log.info("W&B: offline; to upload it: wandb sync %s", folder)
        elif self._wandb_run.url:
            log.info("W&B: %s", self._wandb_run.url)

    def log(self, group: str, row: Row) -> None:
        values = {f"{group}/{name}": value for name, value in row.items() if name != "step"}
        self._wandb_run.log({"step": row["step"], **values})

    def finish(self, metrics: Row, finished: bool) -> None:
        self._wandb_run.summary.update({f"final/{name}": value for name, value in metrics.items()})
        self._wandb_run.finish(exit_code=0 if finished else 1)

    def _init(self, wandb: Any, identity: str, mode: str | None) -> Any:
        config = self.run.config
        settings = {
            "console": "off",  # it would take stdout and stderr away from the progress bar
            "silent": True,
            "init_timeout": INIT_TIMEOUT,
            "finish_timeout": FINISH_TIMEOUT,
            "disable_git": True,
        }
        known = getattr(wandb.Settings, "model_fields", settings)  # of other versions of W&B
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fastirt",
            name=os.environ.get("WANDB_NAME") or self.run.name,
            dir=str(self.run.files.path),
            id=identity,
            resume="allow",
            mode=mode,
            config=flatten(config.to_dict()),
            settings=wandb.Settings(**{name: value for name, value in settings.items() if name in known}),
        )

    def _mode(self, wandb: Any) -> str | None:
        """The mode of the user, or offline where W&B would ask for a key."""
        if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_DISABLED"):
            return None
        settings = wandb.setup().settings
        if settings.mode not in (None, "online"):  # of the user's settings files
            return settings.mode
        if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
            return None
        if _has_netrc_entry(settings.base_url):
            return None
        log.warning("--tracker wandb: no API key (wandb login, or WANDB_API_KEY): writes offline")
        return "offline"


def _has_netrc_entry(url: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
