"""The optimiser by its timm name, the learning-rate schedule, and a step that can be held back on the device."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from fastirt.config import OptimConfig
from fastirt.errors import UserError

FUSED = ("adam", "adamw", "sgd", "momentum", "nesterov")  # torch's own, which take `fused=True` and `found_inf`


def build_optimizer(vit: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's factory, with its groups: no weight decay on biases, norms, tokens and position embeddings."""
    name = config.opt.lower()
    base = name.split("_")[-1]  # timm: lookahead_adamw
    if base not in list_optimizers():
        close = difflib.get_close_matches(base, list_optimizers(), n=3)
        raise UserError(f"--opt {config.opt}: no such optimiser in timm; close names: {', '.join(close) or 'none'}")
    extra = {"fused": True} if name in FUSED else {}
    if config.opt_betas is not None:
        extra["betas"] = tuple(config.opt_betas)
    if config.opt_eps is not None:
        extra["eps"] = config.opt_eps
    try:
        optimizer = create_optimizer_v2(
            vit, name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **extra
        )
    except IndexError:
        raise UserError(
            f"--opt-betas {' '.join(map(str, config.opt_betas or ()))}: too few for --opt {config.opt}"
        ) from None
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--opt {config.opt}: cannot be made with these settings: {str(error).strip().splitlines()[0]}"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt {config.opt}: needs second derivatives, which fused attention has not: choose another")
    return optimizer


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, or a half cosine that ends at 0 after `max_iter` steps."""
    if step < config.warmup_iter:
        return config.lr * (step + 1) / config.warmup_iter
    if config.sched == "constant":
        return config.lr
    share = (step - config.warmup_iter) / max(1, config.max_iter - config.warmup_iter)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def held_step(optimizer: torch.optim.Optimizer, hold: Tensor) -> None:
    """`optimizer.step()`, which leaves every weight as it was where the 0-d bool tensor `hold` is true; no synchronisation.

    torch's fused optimisers skip by themselves (the hook that GradScaler uses); any other is undone. The state of those
    others is not: a held step ends the run.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale, optimizer.found_inf = None, hold.float()
        optimizer.step()
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        before = [p.clone() for p in weights]
    optimizer.step()
    with torch.no_grad():
        for p, old in zip(weights, before):
            p.copy_(torch.where(hold, old, p))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, then each state tensor in its weight's memory layout, which torch's fused kernels take for granted."""
    optimizer.load_state_dict(state)
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
