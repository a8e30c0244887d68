"""Everything a run can be told, as plain dataclasses: one per component, one field per flag.

A field `lr` is the flag `--lr`; its metadata holds the help text, the choices and further names. `presets.py` fills what the
user did not give, `cli.py` builds `--help` from here, and a run stores the resolved tree as `config.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

DATASETS = ("cub200", "sop", "inshop", "folder", "csv", "demo")
METHODS = ("irt-o", "irt-l", "irt-r")
RECIPES = ("paper", "unofficial")
OPTIONAL_FLOATS = Optional[tuple[float, ...]]


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, aliases: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "aliases": aliases})


@dataclass(frozen=True)
class DataConfig:
    """Data set and sampler"""

    dataset: str = option("cub200", "which data set, and so which layout on disk", DATASETS)
    data_path: str = option("/data/CUB_200_2011", "folder of the data set (dataset csv: the .csv file or its folder)")
    packed: Optional[str] = option(
        None, "packed store made by `fastirt pack`; images are read from it instead of from files"
    )
    m: int = option(
        0,
        "images per class in a batch; 0: shuffled epochs (torchrun takes --m for its own)",
        aliases=("m-per-class",),
    )


@dataclass(frozen=True)
class InputConfig:
    """Images to batches"""

    input_size: int = option(224, "side of the square that the model sees, in pixels")
    resize: str = option(
        "square", "before the crop: whole image to a square, or its shorter side", ("square", "shorter")
    )
    resize_size: int = option(256, "side in pixels after the resize")
    orientation: str = option(
        "stored",
        "turn each image upright as its EXIF data says, or leave it as stored, as published results were made",
        ("exif", "stored"),
    )
    normalization: str = option("model", "mean and std: the model's own (timm) or ImageNet's", ("model", "imagenet"))
    loader: str = option("dali", "DALI pipeline, or its plain PIL twin", ("dali", "pil"))
    num_workers: int = option(16, "threads that read and decode; at most the cores there are")
    pin_mem: bool = option(True, "stage batches for a GPU in page-locked memory")
    cache: str = option(
        "auto",
        "decode each image once and keep it, resized, in the GPU's or the host's memory; auto: where it fits",
        ("auto", "device", "host", "none"),
    )
    max_bad: int = option(100, "stop after this many distinct unreadable images")


@dataclass(frozen=True)
class ModelConfig:
    """Encoder"""

    model: str = option("deit_small_distilled_patch16_224", "any vision transformer of timm")
    model_kwargs: tuple[str, ...] = option((), "further timm arguments as key=value, e.g. depth=4 embed_dim=128")
    weights: Optional[str] = option(
        None, "a .safetensors or .pth file, or 'scratch' for random ones; default: timm's pretrained"
    )
    pooling: str = option("cls", "tokens to descriptor", ("cls", "mean", "max", "gem"))
    eval_descriptor: str = option(
        "cls", "distilled models in evaluation: CLS, or the mean of CLS and distillation token", ("cls", "cls+dist")
    )
    drop: float = option(0.0, "dropout rate")
    drop_path: float = option(0.0, "stochastic depth rate of the last block (linear over depth)")
    precision: str = option(
        "auto",
        "of the encoder: bf16 autocast, bf16 weights and activations over fp32 master weights, or fp32; auto: bf16 on a GPU, "
        "fp32 on a CPU",
        ("auto", "bf16", "bf16-weights", "fp32"),
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Contrastive loss and KoLeo"""

    contrastive: str = option("anchor_sum", "normalisation of the contrastive term", ("anchor_sum", "nonzero_mean"))
    margin: float = option(0.5, "cosine above which a negative pair is pushed apart (beta)")
    lambda_reg: float = option(0.7, "weight of the KoLeo term (lambda)")
    loss_impl: str = option(
        "auto", "fused Triton kernels, or plain PyTorch; auto: Triton on a GPU", ("auto", "triton", "reference")
    )
    loss_precision: str = option(
        "auto",
        "of the similarities; auto: tf32 where the encoder runs in bf16, else fp32",
        ("auto", "bf16", "tf32", "fp32"),
    )


@dataclass(frozen=True)
class MemoryConfig:
    """Cross-batch memory and momentum twin"""

    memory_ratio: float = option(1.0, "size of the memory as a share of the training set; 0: none")
    memory_dtype: str = option("fp32", "of the stored embeddings", ("fp32", "bf16"))
    memory_sharded: bool = option(
        False,
        "with many ranks, each holds its part of the memory instead of all; for memories that one GPU cannot hold",
    )
    memory_start: int = option(0, "step from which the memory is filled and used")
    encoder_momentum: Optional[float] = option(
        None, "momentum of the twin that fills the memory, e.g. 0.999; default: no twin"
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule"""

    max_iter: int = option(2000, "optimiser steps; 0: evaluate only")
    batch_size: int = option(64, "images per step, over all processes")
    lr: float = option(3e-5, "peak learning rate")
    engine: str = option(
        "auto",
        "how a step runs: eager PyTorch, torch.compile, or one CUDA graph; auto: graph on one GPU, compile on many or where "
        "the optimiser cannot be captured, eager on a CPU",
        ("auto", "eager", "compile", "graph"),
    )
    opt: str = option("adamw", "optimiser, by its timm name, or apex-fused-adam, apex-fused-lamb (NVIDIA apex)")
    opt_eps: Optional[float] = option(1e-8, "optimiser epsilon")
    opt_betas: OPTIONAL_FLOATS = option(None, "optimiser betas; default: the optimiser's own")
    clip_grad: Optional[float] = option(None, "clip the gradient to this global norm")
    momentum: float = option(0.9, "momentum, for optimisers that have one")
    weight_decay: float = option(5e-4, "weight decay; none on biases, norms, tokens and position embeddings")
    sched: str = option("constant", "learning rate after the warm-up", ("constant", "cosine"))
    warmup_iter: int = option(0, "steps of linear warm-up")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    rank: tuple[int, ...] = option((1, 2, 4, 8), "compute Recall@K for these K")
    eval_split: str = option(
        "test", "where a data set has a test and a validation split: the one to evaluate", ("test", "val")
    )
    eval_freq: int = option(0, "evaluate every so many steps and keep the best model; 0: only at the end")
    eval_batch_size: int = option(128, "images per batch in evaluation")
    search: str = option(
        "auto", "nearest neighbours by FAISS or plain torch; auto: FAISS where it can", ("auto", "faiss", "torch")
    )


@dataclass(frozen=True)
class RunConfig:
    """The run"""

    output_dir: Optional[str] = option(None, "the run's folder; default: a new one under outputs/DATASET")
    log_dir: Optional[str] = option(None, "TensorBoard logs go to LOG_DIR/DATASET; default: into the run's folder")
    logging_freq: int = option(50, "steps between log lines")
    save_freq: int = option(1000, "steps between checkpoints; 0: only when stopped and at the end")
    check_freq: int = option(
        500,
        "with many ranks, steps between checks that all hold the same weights, twin and memory; 0: only at checkpoints",
    )
    keep: int = option(2, "how many checkpoints to keep")
    resume: Optional[str] = option(
        None, "go on from a run folder or checkpoint; without a value: from --output-dir, where it has one"
    )
    profile: int = option(0, "trace this many steps with torch's profiler and print where their time went")
    device: Optional[str] = option(None, "cuda, cuda:1, cpu; default: a GPU where there is one")
    seed: int = option(0, "seed of everything random")


@dataclass(frozen=True)
class Config:
    """One run, resolved. `method` and `recipe` name the presets it came from."""

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
        """A copy with fields set by their bare names, wherever in the tree they live."""
        own = {name: flat.pop(name) for name in ("method", "recipe") if name in flat}
        parts = {}
        for name, part in self.parts().items():
            mine = {f.name: flat.pop(f.name) for f in dataclasses.fields(part) if f.name in flat}
            parts[name] = dataclasses.replace(part, **mine)
        if flat:
            raise KeyError(f"no such option: {', '.join(sorted(flat))}")
        return dataclasses.replace(self, **own, **parts)

    def parts(self) -> dict[str, Any]:
        """The component configs by name, in the order of `--help`."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if dataclasses.is_dataclass(getattr(self, f.name))
        }

    def to_dict(self) -> dict[str, Any]:
        """A tree of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`; JSON's lists become tuples again. Raises KeyError on an unknown name."""
        return cls().replace(**{k: tuple(v) if isinstance(v, list) else v for k, v in flatten(tree).items()})

    def describe_input(self) -> str:
        """How images become descriptors, for the first line of whatever resizes them: recipe, resize, crop, mean and std."""
        size, resized = self.input.input_size, self.input.resize_size
        resize = f"{resized} x {resized}" if self.input.resize == "square" else f"shorter side {resized}"
        own = "the model's own" if self.input.normalization == "model" else "ImageNet's"
        return (
            f"recipe {self.recipe}: resize to {resize}, crop {size} x {size}, mean and std {own}, "
            f"orientation {self.input.orientation}"
        )

    def difference(self, other: "Config") -> list[str]:
        """`name: mine, theirs` for each field that is not the same in both."""
        mine, theirs = flatten(self.to_dict()), flatten(other.to_dict())
        return [f"{name}: {mine[name]!r}, {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]


# Options that say nothing of a model that is not trained.
TRAINING_OPTIONS = {
    field.name for part in (ObjectiveConfig, MemoryConfig, OptimConfig) for field in dataclasses.fields(part)
} | {"m", "drop", "drop_path"}


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Bare field name to value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat
