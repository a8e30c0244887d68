"""Checks of a resolved configuration that need no data."""

from __future__ import annotations

import dataclasses
import math
from typing import Iterable

from fastirt.config.options import Config
from fastirt.errors import UserError

AT_LEAST = {  # option: smallest valid value; others: 0
    "m": 0,
    "input_size": 1,
    "resize_size": 1,
    "num_workers": 0,
    "max_bad": 0,
    "memory_ratio": 0,
    "memory_start": 0,
    "max_iter": 0,
    "batch_size": 1,
    "lr": 0,
    "warmup_iter": 0,
    "eval_freq": 0,
    "eval_batch_size": 1,
    "logging_freq": 1,
    "save_freq": 0,
    "keep": 1,
    "lambda_reg": 0,
    "weight_decay": 0,
    "opt_eps": 0,
    "seed": 0,
    "margin": -1,
}
AT_MOST = {"drop": 1, "drop_path": 1, "encoder_momentum": 1, "margin": 1, "momentum": 1, "seed": 2**63 - 1}


def validate(config: Config, ranks: int = 1) -> None:
    """Check every option and the batch size for `ranks` processes.

    Raises UserError for a value outside its range, for options that exclude each other, and for a
    batch that does not divide by M or by the number of ranks.
    """
    for part in config.parts().values():
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                check_number(field.name, value)
    if config.optim.clip_grad is not None and not config.optim.clip_grad > 0:
        raise UserError(f"--clip-grad {config.optim.clip_grad}: must be above 0; leave it out for no clipping")
    if not config.eval.rank:
        raise UserError("--rank: needs at least one K")
    check_ks(config.eval.rank)
    if config.memory.encoder_momentum is not None and config.memory.memory_ratio == 0:
        raise UserError("--encoder-momentum fills the memory, but --memory-ratio is 0: leave one of them out")
    whole, m = config.optim.batch_size, config.data.m
    if m and whole % m and config.optim.max_iter:
        raise UserError(f"--batch-size {whole} is not a multiple of --m {m}: use {max(1, whole // m) * m}")
    if whole % ranks and config.optim.max_iter:
        part = math.lcm(ranks, m or 1)
        below = whole // part * part
        sizes = f"{below} or {below + part}" if below else str(part)
        raise UserError(
            f"--batch-size {whole}: must be divisible by {ranks}, because {ranks} ranks share it: use {sizes}"
        )
    if config.optim.opt_betas is not None and not all(0 <= beta < 1 for beta in config.optim.opt_betas):
        raise UserError(f"--opt-betas {' '.join(map(str, config.optim.opt_betas))}: each must be in [0, 1)")


def check_ks(
    ks: Iterable[int], reachable: int | None = None, gallery: str = "the gallery", beside_query: bool = False
) -> None:
    """Raises UserError for a K of Recall@K below 1 or above `reachable`, the usable gallery images.

    gallery: its name in the message. beside_query: whether the gallery also holds the query itself.
    """
    for k in ks:
        if k < 1:
            raise UserError(f"--rank {k}: every K must be at least 1")
        if reachable is not None and k > reachable:
            beside = " beside the query" if beside_query else ""
            raise UserError(
                f"--rank {k}: {gallery} has only {reachable:,} images{beside}: use K of at most {reachable}"
            )


def check_number(name: str, value: float) -> None:
    """Raises UserError for a value that is not finite or outside the range of the option `name`."""
    flag = f"--{name.replace('_', '-')} {value}"
    if not math.isfinite(value):
        raise UserError(f"{flag}: must be a finite number")
    if value < AT_LEAST.get(name, 0):
        raise UserError(f"{flag}: must be at least {AT_LEAST.get(name, 0)}")
    if value > AT_MOST.get(name, math.inf):
        raise UserError(f"{flag}: must be at most {AT_MOST[name]}")
