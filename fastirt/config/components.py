"""The options of a run by component, as plain dataclasses: one field per command-line flag.

A field `lr` is the flag `--lr`; its metadata holds help text, choices and aliases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from fastirt.config.user_code import short_name

DATASETS = ("cub200", "sop", "inshop", "folder", "csv", "demo")
METHODS = ("irt-o", "irt-l", "irt-r")
RECIPES = ("paper", "unofficial")
RESIZES = ("square", "shorter")
ORIENTATIONS = ("exif", "stored")
SEARCHES = ("auto", "ranks", "faiss", "torch")
AVERAGES = ("query", "class")
TRACKERS = ("none", "tensorboard", "wandb", "mlflow")
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")  # of the JPEG images in a packed store
OPTIONAL_FLOATS = Optional[tuple[float, ...]]


class OrUserCode(tuple):
    """Choices of an option that may also name a user's function; see `config/user_code.py`."""

    def __contains__(self, value: object) -> bool:
        return ":" in str(value) or super().__contains__(value)


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, aliases: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "aliases": aliases})


@dataclass(frozen=True)
class DataConfig:
    """Data set and sampler"""

    dataset: str = option(
        "cub200",
        "data set, which determines its layout on disk; or FILE.py:NAME, a function from the path to records",
        OrUserCode(DATASETS),
    )
    data_path: str = option("/data/CUB_200_2011", "folder of the data set (dataset csv: the .csv file or its folder)")
    packed: Optional[str] = option(None, "read images from this store made by `fastirt pack` instead of from files")
    m: int = option(
        0,
        "images per class in a batch; 0: shuffled epochs (with torchrun write --m-per-class)",
        aliases=("m-per-class",),
    )

    @property
    def name(self) -> str:
        """The data set's name for folders: NAME of a user's FILE.py:NAME."""
        return short_name(self.dataset)


@dataclass(frozen=True)
class InputConfig:
    """Images to batches"""

    input_size: int = option(224, "side of the square crop, in pixels")
    resize: str = option("square", "resize before the crop: the image to a square, or its shorter side", RESIZES)
    resize_size: int = option(256, "side after the resize, in pixels")
    orientation: str = option(
        "stored",
        "turn images upright by their EXIF data, or use them as stored, like published results",
        ORIENTATIONS,
    )
    augment: Optional[str] = option(
        None, "FILE.py:NAME, a function of your own that changes training images between crop and normalization"
    )
    normalization: str = option("model", "mean and std: the model's own (timm) or ImageNet's", ("model", "imagenet"))
    loader: str = option(
        "auto",
        "decode by NVIDIA DALI, torchvision, or Pillow (slower reference); auto: DALI on a GPU, torchvision on a CPU "
        "(DALI works there too)",
        ("auto", "dali", "torchvision", "pil"),
    )
    num_workers: int = option(16, "threads that read and decode; at most the number of cores")
    pin_mem: bool = option(True, "copy batches to a GPU from page-locked memory")
    cache: str = option(
        "auto",
        "decode each image once and keep it, resized, in GPU or host memory; auto: where training images fit in "
        "40 % of the GPU's free memory or half of the host's; with --eval-freq also those of evaluation, in another "
        "20 or 25 %",
        ("auto", "device", "host", "none"),
    )
    max_bad: int = option(100, "stop after this many distinct unreadable images")


@dataclass(frozen=True)
class ModelConfig:
    """Encoder"""

    model: str = option("deit_small_distilled_patch16_224", "a timm vision transformer")
    model_kwargs: tuple[str, ...] = option(
        (), "further arguments of the timm model as key=value, e.g. depth=4 embed_dim=128"
    )
    weights: Optional[str] = option(
        None, "a .safetensors or .pth file, or 'scratch' for random weights; default: timm's pretrained"
    )
    pooling: str = option("cls", "how tokens become a descriptor", ("cls", "mean", "max", "gem"))
    eval_descriptor: str = option(
        "cls", "of distilled models: the CLS token, or its mean with the distillation token", ("cls", "cls+dist")
    )
    drop: float = option(0.0, "dropout rate")
    drop_path: float = option(0.0, "stochastic depth rate of the last block (linear over depth)")
    precision: str = option(
        "auto",
        "of the encoder: bf16 autocast, bf16 weights and activations with fp32 master weights, or fp32; "
        "auto: bf16 on a GPU, fp32 on a CPU",
        ("auto", "bf16", "bf16-weights", "fp32"),
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Contrastive loss and KoLeo"""

    objective: Optional[str] = option(
        None, "FILE.py:NAME, a loss of your own instead: a function of embeddings, labels and memory"
    )
    contrastive: str = option("anchor_sum", "normalization of the contrastive term", ("anchor_sum", "nonzero_mean"))
    margin: float = option(0.5, "cosine above which a negative pair is pushed apart (beta)")
    lambda_reg: float = option(0.7, "weight of the KoLeo term (lambda)")
    loss_impl: str = option(
        "auto",
        "fused Triton kernels, tiles for a CPU's cache, or plain PyTorch; auto: Triton on a GPU, tiles on a CPU",
        ("auto", "triton", "tiled", "reference"),
    )
    loss_precision: str = option(
        "auto",
        "of the similarities; auto: fp32 with an fp32 encoder, else bf16 with a bf16 memory, tf32 with an fp32 one",
        ("auto", "bf16", "tf32", "fp32"),
    )


@dataclass(frozen=True)
class MemoryConfig:
    """Cross-batch memory and momentum encoder"""

    memory_ratio: float = option(1.0, "size of the memory as a share of the training set; 0: no memory")
    memory_dtype: str = option("fp32", "of the stored embeddings", ("fp32", "bf16"))
    memory_sharded: bool = option(
        False,
        "distributed: each rank holds a part of the memory, for memories larger than one GPU",
    )
    memory_start: int = option(0, "first step that fills and uses the memory")
    encoder_momentum: Optional[float] = option(
        None, "momentum of an encoder that fills the memory, e.g. 0.999; default: no momentum encoder"
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule"""

    max_iter: int = option(2000, "optimizer steps; 0: evaluate only")
    batch_size: int = option(64, "images per step, all processes together")
    lr: float = option(3e-5, "peak learning rate")
    engine: str = option(
        "auto",
        "how a step runs: eager PyTorch, eager with oneDNN's fp32 products on a CPU, torch.compile, or one CUDA graph; "
        "auto: graph on one GPU, compile on several or if the optimizer cannot be captured; on a CPU eager, above "
        "100 TFLOP in all onednn on AMD's with AVX-512, above 0.5 PFLOP a core compile",
        ("auto", "eager", "onednn", "compile", "graph"),
    )
    opt: str = option("adamw", "optimizer: a timm name, or apex-fused-adam, apex-fused-lamb (NVIDIA apex)")
    opt_eps: Optional[float] = option(1e-8, "optimizer epsilon")
    opt_betas: OPTIONAL_FLOATS = option(None, "optimizer betas; default: the optimizer's")
    clip_grad: Optional[float] = option(None, "clip the gradient to this global norm")
    momentum: float = option(0.9, "momentum, for optimizers that have one")
    weight_decay: float = option(5e-4, "weight decay, except of biases, norms, tokens and position embeddings")
    sched: str = option("constant", "learning rate after the warm-up", ("constant", "cosine"))
    warmup_iter: int = option(0, "steps of linear warm-up")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    rank: tuple[int, ...] = option((1, 2, 4, 8), "the K of Recall@K and the other metrics at K")
    eval_split: str = option(
        "test", "split to evaluate if a data set has a test and a validation split", ("test", "val")
    )
    eval_freq: int = option(0, "steps between evaluations, which keep the best model; 0: only at the end")
    eval_batch_size: int = option(128, "images per batch in evaluation")
    average: str = option(
        "query", "metrics are means over queries, or over classes of the mean over a class's queries", AVERAGES
    )
    search: str = option(
        "auto",
        "ranks: exact ranks of all positives, by counting; faiss, torch: the nearest images alone, by FAISS or plain "
        "torch; auto: faiss on a GPU for K and classes of at most 2,048, else ranks",
        SEARCHES,
    )


@dataclass(frozen=True)
class RunConfig:
    """The run"""

    output_dir: Optional[str] = option(None, "folder of the run; default: a new one under outputs/DATASET")
    log_dir: Optional[str] = option(None, "write TensorBoard logs to LOG_DIR/DATASET; default: to the run's folder")
    tracker: tuple[str, ...] = option(
        ("tensorboard",), "where rows of log.jsonl, options and final metrics go too", TRACKERS
    )
    logging_freq: int = option(50, "steps between log lines")
    save_freq: int = option(0, "steps between checkpoints; alone it replaces --save-seconds; 0: none")
    save_seconds: int = option(
        300,
        "seconds between checkpoints; alone it replaces --save-freq; 0: none. A run that ends or is stopped leaves one",
    )
    check_freq: int = option(
        500,
        "distributed: steps between checks that all ranks hold the same weights and memory; 0: only at checkpoints",
    )
    keep: int = option(2, "number of checkpoints to keep")
    resume: Optional[str] = option(
        None, "continue from a run folder or checkpoint; without a value: from --output-dir, if it has one"
    )
    profile: int = option(0, "trace this many steps with torch's profiler and print a summary")
    device: Optional[str] = option(None, "cuda, cuda:1 or cpu; default: a GPU if there is one")
    self_check: str = option(
        "on",
        "once a machine: run the custom kernels beside plain PyTorch, which replaces those that fail; never on a CPU",
        ("on", "off"),
    )
    seed: int = option(0, "seed of all random numbers")
