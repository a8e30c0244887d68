"""The whole training step on synthetic pictures: from eager fp32 to the captured bf16 step, and the public recipe."""

from __future__ import annotations

import argparse
import statistics
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch._inductor.config

from benchmarks import public
from benchmarks.results import Results, figure_of
from benchmarks.rounds import in_turns, launches
from benchmarks.variants import patch_matmul
from fastirt.config import Config
from fastirt.encoder import build_encoder
from fastirt.flops import training_flops
from fastirt.input.loader import Batch
from fastirt.step import TrainStep

# The waterfall, each row on top of the one before: name, what `Config.replace` is given.
WATERFALL: dict[str, dict[str, Any]] = {
    "eager fp32": dict(engine="eager", precision="fp32", loss_impl="reference"),
    "+ bf16 autocast": dict(engine="eager", precision="bf16", loss_impl="reference"),
    "+ fused loss": dict(engine="eager", precision="bf16", loss_impl="auto"),
    "+ torch.compile": dict(engine="compile", precision="bf16", loss_impl="auto"),
    "+ CUDA graph": dict(engine="graph", precision="bf16", loss_impl="auto"),
}
ALONE: dict[str, dict[str, Any]] = {  # beside the waterfall's last row, one change each
    "graph, bf16 weights": dict(precision="bf16-weights"),
    "graph, patch matmul": dict(transform=patch_matmul),
    "graph, max-autotune": dict(inductor={"max_autotune": True}),
    "graph, momentum twin": dict(encoder_momentum=0.999),
    "graph, bf16 memory": dict(memory_dtype="bf16"),
    "graph, apex FusedAdam": dict(opt="apex-fused-adam"),
    "compile, apex FusedLAMB": dict(engine="compile", opt="apex-fused-lamb"),
    "compile, timm LAMB": dict(engine="compile", opt="lamb"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="timm name (default: deit_small_patch16_224; on a CPU vit_tiny_patch16_224)")
    parser.add_argument("--input-size", type=int, help="(default: 224; on a CPU 64)")
    parser.add_argument("--batch-size", type=int, nargs="+", help="(default: 64 256; on a CPU 16)")
    parser.add_argument("--slots", type=int, help="of the memory (default: 59551; on a CPU 2000)")
    parser.add_argument("--only", nargs="+", help="names of contenders, e.g. '+ CUDA graph'")
    parser.add_argument("--steps", type=int, help="in a round (default: 20; on a CPU 3)")


def batches(size: int, count: int, device: torch.device) -> Iterator[Batch]:
    """Endless: eight random uint8 batches (count, size, size, 3), two pictures a class."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(8):
        images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator).to(device)
        labels = (
            torch.randint(0, 10_000, (count // 2 + 1,), generator=generator).repeat_interleave(2)[:count].to(device)
        )
        made.append((images, labels))
    step = 0
    while True:
        images, labels = made[step % 8]
        yield Batch(images, labels, np.arange(count), step, count)
        step += 1


def ours(changes: dict[str, Any], sizes: dict[str, Any], device: torch.device) -> tuple[Callable[[], None], TrainStep]:
    """A call that does one step of IRT_R, recipe `paper`, and the step itself, which has done one: the compiler has run.

    Of `changes`, `transform` is called with the encoder, `inductor` configures the compiler, and the rest are options.
    """
    changes = dict(changes)
    transform, inductor = changes.pop("transform", None), changes.pop("inductor", {})
    flat = dict(
        weights="scratch", max_iter=10**6, batch_size=sizes["batch_size"], model=sizes["model"], memory_ratio=1.0
    )
    config = Config().replace(**{**flat, **changes})
    torch.manual_seed(0)
    encoder = build_encoder(config.model, sizes["input_size"])
    if transform is not None:
        transform(encoder)
    module = TrainStep(encoder, config, sizes["slots"], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), device)
    stream = batches(sizes["input_size"], sizes["batch_size"], device)
    with torch._inductor.config.patch(inductor):
        module(next(stream))
    return lambda: module(next(stream)), module


def peer(sizes: dict[str, Any], device: torch.device) -> Callable[[], float]:
    """One step of the public recipe, on normalised float32 batches that are already on the device."""
    torch.manual_seed(0)
    config = Config().replace(weights="scratch", model=sizes["model"])
    recipe = public.Recipe(build_encoder(config.model, sizes["input_size"]).vit, sizes["slots"], device)
    stream = batches(sizes["input_size"], sizes["batch_size"], device)
    floats = [
        (b.images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(), b.labels)
        for b, _ in zip(stream, range(2))
    ]
    count = iter(range(10**9))
    return lambda: recipe(*floats[next(count) % 2])


def contenders(device: torch.device) -> dict[str, dict[str, Any] | None]:
    """By name; None is the public recipe."""
    if device.type == "cuda":
        last = list(WATERFALL.values())[-1]
        return {**WATERFALL, "public recipe": None, **{name: {**last, **changes} for name, changes in ALONE.items()}}
    return {
        "eager fp32": WATERFALL["eager fp32"],
        "compile fp32": dict(engine="compile", precision="fp32"),
        "public recipe": None,
    }


def run(args: argparse.Namespace, results: Results) -> None:
    on_gpu = results.device.type == "cuda"
    if not on_gpu:
        for name in [*WATERFALL, *ALONE][1:]:
            results.missing("step", name, "needs a GPU")
    for batch_size in args.batch_size or (
        [64] if on_gpu and args.quick else [64, 256] if on_gpu else [8 if args.quick else 16]
    ):
        sizes = dict(
            model=args.model or ("deit_small_patch16_224" if on_gpu else "vit_tiny_patch16_224"),
            input_size=args.input_size or (224 if on_gpu else 32 if args.quick else 64),
            batch_size=batch_size,
            slots=args.slots or (59551 if on_gpu else 500 if args.quick else 2000),
        )
        _measure(args, sizes, results)


def _measure(args: argparse.Namespace, sizes: dict[str, Any], results: Results) -> None:
    device, on_gpu = results.device, results.device.type == "cuda"
    calls: dict[str, Callable[[], Any]] = {}
    flops = 0
    for name, changes in contenders(device).items():
        if args.only and name not in args.only:
            continue
        try:
            if changes is None:
                calls[name] = peer(sizes, device)
            else:
                calls[name], module = ours(changes, sizes, device)
                flops = training_flops(module.encoder)
            calls[name]()
        except Exception as error:  # no apex, no compiler, no memory: the others go on
            calls.pop(name, None)
            results.missing("step", name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
    steps = args.steps or (2 if args.quick else 20 if on_gpu else 3)
    timed = in_turns(calls, device, args.repeats or (2 if args.quick else 7), steps)
    base = timed.get("public recipe")
    for name, found in timed.items():
        if isinstance(found, str):
            results.missing("step", name, found)
            continue
        rates = [sizes["batch_size"] / seconds for seconds in found.seconds]
        precision = "bf16" if on_gpu else "fp32"
        top = results.limits[precision] * 1e12
        extra: dict[str, Any] = {"ms": 1e3 * statistics.median(found.seconds), "peak_bytes": found.peak_bytes}
        extra["MFU"] = statistics.median(rates) * flops / top if flops else None
        if base is not None and not isinstance(base, str):
            extra["times_public"] = statistics.median(base.seconds) / statistics.median(found.seconds)
        extra |= launches(calls[name], device)
        results.add(
            figure_of(
                rates, part="step", name=name, unit="imgs/s", params=sizes, limit=top / flops if flops else None,
                limit_name=f"{precision} products", extra=extra,
            )
        )  # fmt: skip
