"""Presets by data set, method and recipe: defaults for the flags that the user does not pass."""

from __future__ import annotations

from typing import Any

from fastirt.config.options import Config, save_interval
from fastirt.config.user_code import is_user_code
from fastirt.errors import UserError

# The paper (El-Nouby et al. 2021), and its best-known public re-implementation.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": dict(
        contrastive="anchor_sum",
        input_size=224,
        resize="square",
        resize_size=256,
        normalization="model",
        eval_descriptor="cls",
        drop_path=0.0,
        model="deit_small_patch16_224",
    ),
    "unofficial": dict(
        contrastive="nonzero_mean",
        input_size=224,
        resize="shorter",
        resize_size=256,
        normalization="imagenet",
        eval_descriptor="cls+dist",
        drop_path=0.1,
        model="deit_small_distilled_patch16_224",
    ),
}

DATA_PATHS = {
    "cub200": "/data/CUB_200_2011",
    "sop": "/data/Stanford_Online_Products",
    "inshop": "/data/In-shop",
    "demo": "data/demo",
}

PUBLISHED = ("cub200", "sop", "inshop")  # published results ignore EXIF orientation

# Defaults of both recipes by data set, used with --recipe or --method.
DATASETS: dict[str, dict[str, Any]] = {
    "cub200": dict(m=0, max_iter=2000, rank=(1, 2, 4, 8)),
    "sop": dict(m=2, max_iter=35000, rank=(1, 10, 100, 1000)),
    "inshop": dict(m=2, max_iter=35000, rank=(1, 10, 20, 30), memory_ratio=0.2, encoder_momentum=0.999),
    "folder": {},
    "csv": {},
    "demo": {},
}

# Training from scratch on rendered images, chosen by experiment (benchmarks/LOG.md).
DEMO: dict[str, Any] = dict(
    recipe="demo",
    model="vit_tiny_patch16_224",
    weights="scratch",
    pooling="mean",
    input_size=48,
    resize="shorter",
    resize_size=54,
    model_kwargs=("patch_size=8", "embed_dim=128", "depth=4", "num_heads=4"),
    drop_path=0.0,
    contrastive="nonzero_mean",
    m=4,
    batch_size=64,
    max_iter=600,
    lr=1e-3,
    sched="cosine",
    warmup_iter=50,
    weight_decay=0.05,
    memory_ratio=1.0,
    memory_start=200,
    lambda_reg=0.3,
    logging_freq=50,
    save_freq=100,
)


def resolve(flags: dict[str, Any], command: str = "train") -> Config:
    """The complete configuration for the user's flags, by field name.

    The default recipe is the paper's, except for `train` with neither `--recipe` nor `--method`: it
    has the public re-implementation's defaults for every data set, so that its command lines keep
    their meaning. The default method is IRT_R, or the one that --lambda-reg and --max-iter imply.
    Raises UserError for contradictory flags.
    """
    flags = dict(flags)
    dataset = flags.get("dataset", "cub200")
    as_public = command == "train" and "recipe" not in flags and "method" not in flags
    recipe = flags.get("recipe") or ("unofficial" if as_public else "paper")
    filled: dict[str, Any] = {
        "data_path": DATA_PATHS.get(dataset, "."),
        "orientation": "stored" if dataset in PUBLISHED else "exif",
    }
    if dataset == "demo" and "recipe" not in flags:
        filled.update(DEMO)
    else:
        filled.update(RECIPES[recipe], recipe=recipe)
        if not as_public:
            filled.update(DATASETS.get(dataset, {}))
    filled["resize_size"] = scaled_resize(flags, filled["input_size"], filled["resize_size"])
    if flags.get("memory_ratio") == 0:
        filled.pop("encoder_momentum", None)  # a momentum encoder only fills the memory
    if (dataset in ("folder", "csv") or is_user_code(dataset)) and "data_path" not in flags:
        raise UserError(f"--dataset {dataset} needs --data-path")
    if command != "train":
        flags.setdefault("max_iter", 0)
    filled.update(save_interval(filled))
    filled.update(save_interval(flags))
    filled["method"] = _method(flags)
    return Config().replace(**{**filled, **_method_values(filled["method"]), **flags, "method": filled["method"]})


def scaled_resize(flags: dict[str, Any], input_size: int, resize_size: int) -> int:
    """The value of --resize-size, by default in proportion to --input-size."""
    scale = flags.get("input_size", input_size) / input_size
    return flags.get("resize_size", round(resize_size * scale))


def _method(flags: dict[str, Any]) -> str:
    """The value of --method, or the method that other flags imply. Raises UserError."""
    steps, weight = flags.get("max_iter"), flags.get("lambda_reg")
    method = flags.get("method")
    if method is None:
        if steps == 0:
            return "irt-o"
        return "irt-l" if weight == 0 else "irt-r"
    if method == "irt-o" and steps:
        raise UserError(f"--method irt-o does not train, but --max-iter is {steps}: leave one of them out")
    if method in ("irt-o", "irt-l") and weight:
        raise UserError(f"--method {method} has no KoLeo term, but --lambda-reg is {weight}: leave one of them out")
    if method == "irt-r" and weight == 0:
        raise UserError("--method irt-r has a KoLeo term, but --lambda-reg is 0: use --method irt-l")
    return method


def _method_values(method: str) -> dict[str, Any]:
    """Options with a fixed value for the method."""
    if method == "irt-o":
        return {"max_iter": 0}
    return {"lambda_reg": 0.0} if method == "irt-l" else {}
