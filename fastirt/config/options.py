"""All options of a run: the config tree.

`presets.py` fills in defaults by data set and method, `flags.py` makes the command-line flags, and
a run stores the resolved tree as `config.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastirt.config.components import (
    DATASETS,
    METHODS,
    ORIENTATIONS,
    RECIPES,
    RESIZES,
    SUBSAMPLINGS,
    DataConfig,
    EvalConfig,
    InputConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)

__all__ = [
    "DATASETS",
    "METHODS",
    "ORIENTATIONS",
    "RECIPES",
    "RESIZES",
    "SUBSAMPLINGS",
    "TRAINING_OPTIONS",
    "Config",
    "DataConfig",
    "EvalConfig",
    "InputConfig",
    "MemoryConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "flatten",
    "save_interval",
]


@dataclass(frozen=True)
class Config:
    """The resolved options of one run; `Config()` has each component's defaults.

    Attributes:
        method: "irt-o" (off the shelf), "irt-l" (contrastive) or "irt-r" (contrastive + KoLeo).
        recipe: the preset that filled in defaults: "paper", "unofficial" or "demo".
        data: data set and sampler.
        input: images to batches.
        model: encoder and its weights.
        objective: contrastive loss and KoLeo.
        memory: cross-batch memory and momentum encoder.
        optim: optimizer and schedule.
        eval: Recall@K and search.
        run: folders, logs, checkpoints, device and seed.
    """

    method: str = "irt-r"
    recipe: str = "paper"
    data: DataConfig = field(default_factory=DataConfig)
    input: InputConfig = field(default_factory=InputConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def replace(self, **flat: Any) -> "Config":
        """A copy with fields set by name, such as `replace(lr=1e-4, seed=1)`. Raises KeyError."""
        names = {name: flat.pop(name) for name in ("method", "recipe") if name in flat}
        parts = {}
        for name, part in self.parts().items():
            values = {f.name: flat.pop(f.name) for f in dataclasses.fields(part) if f.name in flat}
            parts[name] = dataclasses.replace(part, **values)
        if flat:
            raise KeyError(f"no such option: {', '.join(sorted(flat))}")
        return dataclasses.replace(self, **names, **parts)

    def parts(self) -> dict[str, Any]:
        """The components by name, in the order of `--help`."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if dataclasses.is_dataclass(getattr(self, f.name))
        }

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`, with lists as tuples. Raises KeyError for an unknown name."""
        flat = flatten(tree)
        # runs of version 0.1.0 saved by steps alone
        flat = {**save_interval(flat), **flat}
        return cls().replace(**{k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()})

    def describe_input(self) -> str:
        """Recipe, resize, crop and normalization in one line, for the log."""
        size, resized = self.input.input_size, self.input.resize_size
        resize = f"{resized} x {resized}" if self.input.resize == "square" else f"shorter side {resized}"
        constants = "the model's own" if self.input.normalization == "model" else "ImageNet's"
        return (
            f"recipe {self.recipe}: resize to {resize}, crop {size} x {size}, mean and std {constants}, "
            f"orientation {self.input.orientation}"
        )

    def difference(self, other: "Config") -> list[str]:
        """`name: own value, other's value` for each field that differs."""
        values, others = flatten(self.to_dict()), flatten(other.to_dict())
        return [f"{name}: {values[name]!r}, {others[name]!r}" for name in values if values[name] != others[name]]


# Options that do not matter for a model that is not trained.
TRAINING_OPTIONS = {
    field.name for part in (ObjectiveConfig, MemoryConfig, OptimConfig) for field in dataclasses.fields(part)
} | {"m", "augment", "drop", "drop_path"}


def save_interval(given: dict[str, Any]) -> dict[str, int]:
    """The value of --save-freq or --save-seconds where only the other one is given: none."""
    names = {"save_freq", "save_seconds"}
    missing = names - given.keys()
    return {name: 0 for name in missing} if missing != names else {}


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """The values of a config tree by field name alone."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat
