"""The optimizer by its name, the learning-rate schedule, and a step that the device can skip."""

from __future__ import annotations

import difflib
import math
from typing import Any, Sequence

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from torch import Tensor, nn

from fastirt.config.options import OptimConfig
from fastirt.errors import UserError, first_line

# torch's own, which take `fused=True` and `found_inf`
FUSED = ("adam", "adamw", "sgd", "momentum", "nesterov")
APEX = {"apex-fused-adam": "FusedAdam", "apex-fused-lamb": "FusedLAMB"}
APEX_BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
ENGINE_KEYS = ("lr", "fused", "foreach", "capturable")  # of a parameter group: how it runs


def capturable(name: str) -> bool:
    """Whether a CUDA graph can hold this optimizer: its rate and step count are device tensors."""
    return name.lower() in (*FUSED, "apex-fused-adam")


def build_optimizer(vit: nn.Module, config: OptimConfig, capture: bool = False) -> torch.optim.Optimizer:
    """An optimizer of timm's factory or of NVIDIA apex, with timm's parameter groups.

    Biases, norms, tokens and position embeddings have no weight decay.

    capture: make it ready for a CUDA graph; each group's learning rate is then a 0-d float32
    tensor on the weights' GPU.
    Raises UserError for an unknown name or settings that the optimizer does not take.
    """
    name = config.opt.lower()
    extra: dict[str, Any] = {}
    if config.opt_betas is not None:
        extra["betas"] = tuple(config.opt_betas)
    if config.opt_eps is not None:
        extra["eps"] = config.opt_eps
    if name in APEX:
        return _apex(vit, config, extra, capture)
    base = name.split("_")[-1]  # timm: lookahead_adamw
    if base not in list_optimizers():
        close = difflib.get_close_matches(base, [*list_optimizers(), *APEX], n=3)
        raise UserError(f"--opt {config.opt}: no such optimizer in timm; close names: {', '.join(close) or 'none'}")
    if name in FUSED:
        if len(config.opt_betas or (0, 0)) > 2:  # AdamW itself says so in its first step
            raise UserError(f"--opt-betas {' '.join(map(str, config.opt_betas))}: --opt {config.opt} takes two")
        extra["fused"] = True
        if capture and name.startswith("adam"):
            extra["capturable"] = True
    try:
        optimizer = create_optimizer_v2(
            vit, name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **extra
        )
    except IndexError:
        raise UserError(
            f"--opt-betas {' '.join(map(str, config.opt_betas or ()))}: too few for --opt {config.opt}"
        ) from None
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(f"--opt {config.opt}: does not take these settings: {first_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"--opt {config.opt}: needs second derivatives, which fused attention does not have: choose another"
        )
    if capture:
        # torch would warn of the warm-up steps
        optimizer._warned_capturable_if_run_uncaptured = True
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.lr, dtype=torch.float32, device=group["params"][0].device)
    return optimizer


def _apex(vit: nn.Module, config: OptimConfig, extra: dict[str, Any], capture: bool) -> torch.optim.Optimizer:
    """NVIDIA apex's fused optimizer over timm's groups.

    LAMB's own clipping is off: --clip-grad does it for all optimizers.
    """
    try:
        from apex import optimizers
    except Exception:  # absent, or the other package named apex, which fails in many ways
        raise UserError(
            f"--opt {config.opt}: needs NVIDIA apex, which is not on PyPI; build it: {APEX_BUILD}"
        ) from None
    if not next(vit.parameters()).is_cuda:
        raise UserError(f"--opt {config.opt}: runs on a GPU only: use --opt adamw or lamb")
    name = config.opt.lower()
    if name == "apex-fused-lamb":
        extra["max_grad_norm"] = 1e30
    elif capture:
        extra["capturable"] = True
    spared = vit.no_weight_decay() if hasattr(vit, "no_weight_decay") else ()
    groups = param_groups_weight_decay(vit, config.weight_decay, spared)
    try:
        return getattr(optimizers, APEX[name])(groups, lr=config.lr, weight_decay=0.0, **extra)
    except (ImportError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"--opt {config.opt}: apex cannot make it ({first_line(error)}); build it again: {APEX_BUILD}"
        ) from error


def learning_rate(step: int, config: OptimConfig) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then constant, or a half cosine that
    ends at 0 after `max_iter` steps.
    """
    if step < config.warmup_iter:
        return config.lr * (step + 1) / config.warmup_iter
    if config.sched == "constant":
        return config.lr
    share = (step - config.warmup_iter) / max(1, config.max_iter - config.warmup_iter)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate, in place if it is a tensor; no synchronization."""
    for group in optimizer.param_groups:
        scaled = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def clip_gradients(weights: Sequence[Tensor], largest: float | None) -> Tensor:
    """Scale gradients to a global norm of at most `largest`; returns the norm before, 0-d."""
    gradients = [p.grad for p in weights if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, largest, norm, foreach=True)
    return norm


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """`optimizer.step()`, except that no weight changes where the 0-d bool tensor `skip` is true;
    no synchronization.

    torch's fused optimizers skip by themselves, through GradScaler's `found_inf`. For any other the
    weights are restored but not the optimizer's state: a skipped step ends the run.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()
        optimizer.step()
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        before = [p.clone() for p in weights]
    optimizer.step()
    with torch.no_grad():
        for p, old in zip(weights, before):
            p.copy_(torch.where(skip, old, p))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict` without ENGINE_KEYS, so that a checkpoint fits any engine."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k not in ENGINE_KEYS} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, then each state tensor in its weight's memory layout, which torch's fused
    kernels require.

    The optimizer keeps its own ENGINE_KEYS, whatever engine wrote the state.
    """
    own = [{k: group[k] for k in ENGINE_KEYS if k in group} for group in optimizer.param_groups]
    groups = [{**saved, **kept} for saved, kept in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, Tensor):
                group[name] = value.to(group["params"][0].device)
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
