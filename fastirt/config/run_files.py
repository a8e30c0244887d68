"""The files of a run's folder, by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFiles:
    """Names inside `path`, the folder that a run writes. Nothing here reads or writes."""

    path: Path

    @property
    def config(self) -> Path:
        """Every option, versions, and digests of the images."""
        return self.path / "config.json"

    @property
    def run_file(self) -> Path:
        """The options as a run file: `fastirt train --config RUN/run.yaml` repeats the run."""
        return self.path / "run.yaml"

    @property
    def log(self) -> Path:
        """One JSON line a log step or evaluation."""
        return self.path / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Folder that Weights & Biases writes, with `--tracker wandb`."""
        return self.path / "wandb"

    @property
    def mlflow(self) -> Path:
        """Folder that MLflow writes, with `--tracker mlflow` and without MLFLOW_TRACKING_URI."""
        return self.path / "mlflow"

    @property
    def trackers(self) -> Path:
        """The ids of the run in W&B and MLflow."""
        return self.path / "trackers.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step_*.safetensors`."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}.safetensors"

    @property
    def final_model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def best_model(self) -> Path:
        """By the first metric of the evaluations that `--eval-freq` makes."""
        return self.path / "model_best.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def bad_images(self) -> Path:
        """Images that could not be read, with the reason."""
        return self.path / "bad_pictures.csv"

    @property
    def non_finite(self) -> Path:
        """Step and images of the first non-finite loss."""
        return self.path / "non_finite.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"
