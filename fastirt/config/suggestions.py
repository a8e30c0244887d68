"""Which option a user may have meant by an unknown one."""

from __future__ import annotations

import difflib
from typing import Iterable

# Names of these flags in other trainers.
SYNONYMS = {
    "--epochs": "--max-iter (steps: epochs × training images / batch size)",
    "--epoch": "--max-iter (steps: epochs × training images / batch size)",
    "--num-epochs": "--max-iter (steps: epochs × training images / batch size)",
    "--steps": "--max-iter",
    "--max-steps": "--max-iter",
    "--iterations": "--max-iter",
    "--learning-rate": "--lr",
    "--wd": "--weight-decay",
    "--gpu": "--device",
    "--bs": "--batch-size",
    "--batch": "--batch-size",
    "--optimizer": "--opt",
    "--scheduler": "--sched",
    "--warmup": "--warmup-iter",
    "--warmup-steps": "--warmup-iter",
    "--workers": "--num-workers",
    "--img-size": "--input-size",
    "--image-size": "--input-size",
    "--arch": "--model",
    "--backbone": "--model",
    "--checkpoint": "--weights or --resume",
    "--ckpt": "--weights or --resume",
    "--pretrained": "--weights",
    "--data": "--data-path",
    "--data-dir": "--data-path",
    "--data-root": "--data-path",
    "--output": "--output-dir",
    "--out": "--output-dir",
    "--save-dir": "--output-dir",
    "--amp": "--precision bf16",
    "--fp16": "--precision bf16",
    "--bf16": "--precision bf16",
    "--compile": "--engine compile",
    "--gpus": "torchrun --nproc_per_node, or --device",
    "--temperature": "--margin",
    "--loss": "--contrastive",
    "--topk": "--rank",
    "--k": "--rank",
    "--log-interval": "--logging-freq",
    "--save-interval": "--save-freq",
    "--eval-interval": "--eval-freq",
}


def suggestion(flag: str, known: Iterable[str]) -> str:
    """The known flags closest to an unknown one, or ""."""
    flag, known = flag.partition("=")[0], [name for name in known if name.startswith("--")]
    synonym = SYNONYMS.get(flag.replace("_", "-").lower(), "")
    if synonym and synonym.split()[0] in known:
        return synonym
    near = [name for name in known if name == flag.replace("_", "-").lower()]
    near += [name for name in known if len(flag) > 4 and name.startswith(flag) and name not in near]
    near += [name for name in difflib.get_close_matches(flag, known, n=3, cutoff=0.7) if name not in near]
    return " or ".join(near[:3])


def similar_names(name: str, known: Iterable[str]) -> str:
    """The known names closest to an unknown one, or ""."""
    return " or ".join(difflib.get_close_matches(name.replace("-", "_").lower(), list(known), n=2, cutoff=0.6))
