"""Whole training steps on a fake GPU: `python -m tests.fake_cuda.run step_proof [SETTING ...]`.

Each setting is the project's own `build_train_step`, called as the trainer calls it. The graph
engine runs its warm-up, capture and replays; what it would compile runs as it is.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from types import ModuleType
from typing import Any, Callable
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.fake_cuda import events
from benchmarks.fake_cuda.fake_tensors import fake_module
from benchmarks.fake_cuda.streams import hide, host_waits, lines_of
from fastirt.config.options import Config, ObjectiveConfig
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images import normalize
from fastirt.loading.batch import Batch, ImageViews
from fastirt.model.build import build_encoder
from fastirt.step.cuda_graph import Capture
from fastirt.step.engine import Engine
from fastirt.step.train_step import TrainStep, build_train_step
from tests.fake_cuda.settings import SETTINGS
from tests.fake_cuda.watch import Watch, record_launches

hide(__file__)
CUDA = torch.device("cuda:0")
BATCH, SIZE, IMAGES = 8, 32, 100
LAUNCHES = record_launches()
EXPECTED = {"fp32": "float32", "bf16": "bfloat16", "bf16-weights": "bfloat16"}  # products, by precision


def fake_step(ranks: Ranks = SINGLE_PROCESS, **changes: Any) -> TrainStep:
    """A tiny model's step on the fake GPU; within a FakeTensorMode."""
    model = dict(model="vit_tiny_patch16_224", model_kwargs=("depth=2",), weights="scratch", input_size=SIZE)
    config = Config().replace(**{**model, "batch_size": BATCH, "memory_ratio": 1.0, "warmup_iter": 2, **changes})
    with _disable_current_modes():
        encoder = build_encoder(config.model, SIZE)
    with mock.patch.object(Engine, "optimized", lambda self, function: function):  # inductor's code is another test's
        return build_train_step(fake_module(encoder), config, IMAGES, CUDA, ranks)


def batch_of(step: int) -> Batch:
    images = torch.zeros(BATCH, SIZE, SIZE, 3, dtype=torch.uint8, device=CUDA)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=CUDA)
    return Batch(ImageViews.whole(images), labels, np.arange(BATCH), step, BATCH)


def prove(changes: dict[str, Any]) -> list[str]:
    """What is wrong with the steps of a setting; empty: nothing."""
    # They hold tensors of an earlier setting's mode.
    normalize.byte_table.cache_clear(), normalize.whole_views.cache_clear()
    if changes.get("opt", "").startswith("apex"):
        _stand_in_for_apex()
    LAUNCHES.clear()
    faults: list[str] = []
    try:
        with FakeTensorMode():
            step = fake_step(**changes)
            faults += run_steps(step, batch_of)
            faults += _check_types(step)
        faults += _check_launches(step)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        faults.append(f"the host waits for a value: {error.args[0]} at {_lines(error)}")
    except Exception as error:
        faults.append(f"{type(error).__name__}: {str(error)[:300]} at {_lines(error)}")
    return list(dict.fromkeys(faults))


def run_steps(step: TrainStep, batch_of: Callable[[int], Batch]) -> list[str]:
    """What is wrong with two steps of the eager engine, or with those of the graph engine until
    its graph has been replayed three times."""
    capture = step.engine.capture
    body, bodies = step.body, []

    def watched() -> None:
        with Watch() as watch:
            bodies.append(watch)
            body()

    step.body = watched  # type: ignore[method-assign]
    batches = [batch_of(number) for number in range(2 if capture is None else capture.warm_up + 3)]
    events.clear()
    outside = []
    for batch in batches:
        with Watch() as watch:
            step(batch)
        outside.append(watch)
    faults = [fault for watch in outside for fault in watch.faults]
    waits = host_waits()
    if capture is not None:
        faults += _check_capture(len(batches), len(bodies), capture)
        # the first wait is meant: a capture begins when the device is idle
        waits = waits[1:]
        watched()  # after the replays: the graph's addresses must still be those of the step
        captured, after = bodies[-2:]
        moved = [what for key, what in after.read.items() if key not in captured.read]
        faults += [f"the body reads another address than before: {what}" for what in moved]
    return faults + waits + _check_crossings(step, outside, bodies) + _check_products(step, bodies[-1])


def _check_crossings(step: TrainStep, outside: list[Watch], bodies: list[Watch]) -> list[str]:
    """Only the drop-path masks may come from the host, and not inside the body."""
    networks = step.networks
    encoders = [e for e in (networks.compute_encoder, networks.compute_momentum_encoder) if e is not None]
    masks = sum(bool(encoder.table.rates) for encoder in encoders)
    uploads = [upload for watch in outside for upload in watch.uploads]
    faults = [f"the body copies from the host: {upload}" for watch in bodies for upload in watch.uploads]
    faults += [f"a copy from the host: {upload}" for upload in uploads if "model/drop_path.py" not in upload]
    if len(uploads) != masks * len(outside):
        faults.append(f"{len(uploads)} copies from the host in {len(outside)} steps, {masks} masks each")
    return faults


def _check_products(step: TrainStep, body: Watch) -> list[str]:
    """Products of the encoder are in the precision of the run, the plain loss is in float32."""
    expected = {EXPECTED[step.config.model.precision]}
    if _is_plain(step.config.objective):
        expected.add("float32")
    if set(body.products) != expected:
        return [f"products in {sorted(body.products)} instead of {sorted(expected)}"]
    return []


def _check_capture(steps: int, bodies: int, capture: Capture) -> list[str]:
    """Warm-up, one capture and replays, and all launches on the stream of the capture."""
    warm_up = capture.warm_up
    told = [event[0] for event in events if event[0] in ("capture begins", "capture ends", "replay")]
    expected = ["capture begins", "capture ends", *["replay"] * (steps - warm_up)]
    if told != expected or bodies != warm_up + 1:
        return [f"{bodies} bodies and {told} instead of {warm_up + 1} and {expected}"]
    streams = {event[2] for event in events if event[0] == "launch"}
    return [] if streams == {capture._stream.number} else [f"launches on the streams {sorted(streams)}"]


def _check_launches(step: TrainStep) -> list[str]:
    launched = {launch.name for launch in LAUNCHES}
    expected = {"gather_kernel"}
    if not _is_plain(step.config.objective):
        expected |= {"stats_kernel", "rows_kernel", "totals_kernel", "grad_kernel", "combine_kernel"}
    if waiting := sorted({launch.name for launch in LAUNCHES if not launch.arguments.get("FINITE_SLOTS", True)}):
        return [f"{waiting} wait for labels before they load the memory"]
    return [] if launched == expected else [f"launches {sorted(launched)} instead of {sorted(expected)}"]


def _check_types(step: TrainStep) -> list[str]:
    """Dtypes, devices and layouts of what a step leaves."""
    networks, config, faults = step.networks, step.config, []

    def expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, like: torch.Tensor | None = None) -> None:
        if tensor.dtype != dtype or tensor.device != CUDA:
            faults.append(f"{name} is {tensor.dtype} on {tensor.device} instead of {dtype} on {CUDA}")
        if like is not None and tensor.stride() != like.stride():
            faults.append(f"{name} has strides {tensor.stride()}, its weight {like.stride()}")

    for name, weight in networks.encoder.named_parameters():
        expect(name, weight, torch.float32)
        if weight.grad is None:
            faults.append(f"{name} has no gradient")
        else:
            expect(f"{name}.grad", weight.grad, torch.float32, weight)
        for key, value in step.optimizer.state.get(weight, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                expect(f"{key} of {name}", value, torch.float32, weight)
    compute = torch.bfloat16 if config.model.precision == "bf16-weights" else torch.float32
    for name, weight in networks.compute_encoder.named_parameters():
        expect(f"{name} of the model that computes", weight, compute)
    expect("images", step.input.images, networks.dtype)
    if not step.input.images.is_contiguous(memory_format=torch.channels_last):
        faults.append("images are not channels last")
    expect("memory", step.memory.embeddings, torch.bfloat16 if config.memory.memory_dtype == "bf16" else torch.float32)
    expect("memory's labels", step.memory.labels, torch.int64)
    expect("sums", step.counters.sums, torch.float64)
    expect("first_bad_step", step.counters.first_bad_step, torch.int64)
    return faults


class _Apex(torch.optim.Optimizer):
    """Stands in for apex's optimizers: their arguments, and weights moved on the device."""

    def __init__(self, params: Any, lr: float, weight_decay: float, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, **options))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            torch._foreach_add_(weights, torch._foreach_mul([weight.grad for weight in weights], -group["lr"]))


def _is_plain(objective: ObjectiveConfig) -> bool:
    """Whether the loss is plain PyTorch."""
    return objective.loss_impl == "reference" or objective.objective is not None


def _stand_in_for_apex() -> None:
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    apex.optimizers, optimizers.FusedAdam, optimizers.FusedLAMB = optimizers, _Apex, _Apex  # type: ignore[attr-defined]
    sys.modules.update({"apex": apex, "apex.optimizers": optimizers})


def _lines(error: BaseException) -> str:
    return lines_of(traceback.extract_tb((error.__cause__ or error).__traceback__))


def main(names: list[str]) -> None:
    """Print one JSON line for each setting: its name, seconds, and faults."""
    for name in names or SETTINGS:
        start = time.perf_counter()
        faults = prove(SETTINGS[name])
        print(json.dumps([name, round(time.perf_counter() - start, 1), faults]), flush=True)
