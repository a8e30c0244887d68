"""The whole training step on random images: from eager fp32 to a captured bf16 step, on a CPU eager
fp32 and bf16 and compiled fp32, and the public recipe."""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
from typing import Any, Callable, Iterator

import numpy as np
import torch

from benchmarks.contenders import public_recipe
from benchmarks.contenders.float8 import float8_blocks
from benchmarks.contenders.model_variants import patch_matmul
from benchmarks.predict.measured import us_by_category
from benchmarks.results import Results, figure_of
from benchmarks.rounds import Rounds, profiled, run_interleaved
from benchmarks.timing import reason, release, turns
from fastirt.config.options import Config
from fastirt.distributed.device import keep_freed_memory
from fastirt.loading.batch import Batch, ImageViews
from fastirt.model.build import build_encoder
from fastirt.model.flops import peak_flops, training_flops
from fastirt.step.train_step import TrainStep, build_train_step

# By name, the options of each row of the waterfall: each row adds one change to the row before.
WATERFALL: dict[str, dict[str, Any]] = {
    "eager fp32": dict(engine="eager", precision="fp32", loss_impl="reference"),
    "+ bf16 autocast": dict(engine="eager", precision="bf16", loss_impl="reference"),
    "+ fused loss": dict(engine="eager", precision="bf16", loss_impl="auto"),
    "+ torch.compile": dict(engine="compile", precision="bf16", loss_impl="auto"),
    "+ CUDA graph": dict(engine="graph", precision="bf16", loss_impl="auto"),
}
LAST = "+ CUDA graph"
CPU_BF16 = "eager bf16"
PUBLIC = "public recipe"
# One change each to the waterfall's last row, timed in turns with it. The slowest to compile last.
ABLATIONS: dict[str, dict[str, Any]] = {
    "graph, bf16 weights": dict(precision="bf16-weights"),
    "graph, patch matmul": dict(transform=patch_matmul),
    # `compare` matches committed figures by name, so the older word stays.
    "graph, momentum twin": dict(encoder_momentum=0.999),
    "graph, bf16 memory": dict(memory_dtype="bf16"),
    "graph, apex FusedAdam": dict(opt="apex-fused-adam"),
    "compile, apex FusedLAMB": dict(engine="compile", opt="apex-fused-lamb"),
    "compile, timm LAMB": dict(engine="compile", opt="lamb"),
    "graph, fp8 linear layers": dict(transform=float8_blocks),
    "graph, max-autotune": dict(inductor={"max_autotune": True}),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="timm name (default: deit_small_patch16_224; on a CPU vit_tiny_patch16_224)")
    parser.add_argument("--input-size", type=int, nargs="+", help="(default: 224; on a CPU 64)")
    parser.add_argument("--batch-size", type=int, nargs="+", help="(default: 64 256; on a CPU 16)")
    parser.add_argument("--slots", type=int, help="slots of the memory (default: 59551; on a CPU 2000)")
    parser.add_argument("--only", nargs="+", help="names of contenders, e.g. '+ CUDA graph'")
    parser.add_argument("--skip", nargs="+", default=[], help="names of contenders to leave out")
    parser.add_argument("--steps", type=int, help="steps in a round (default: 20; on a CPU 3)")


def default_model(device: torch.device) -> str:
    """timm name: DeiT-S; on a CPU the smallest ViT."""
    return "deit_small_patch16_224" if device.type == "cuda" else "vit_tiny_patch16_224"


def batches(size: int, count: int, device: torch.device) -> Iterator[Batch]:
    """Endless, from eight random uint8 batches (count, size, size, 3) with two images a class."""
    generator = torch.Generator().manual_seed(0)
    pool = []
    for _ in range(8):
        images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator).to(device)
        labels = (
            torch.randint(0, 10_000, (count // 2 + 1,), generator=generator).repeat_interleave(2)[:count].to(device)
        )
        pool.append((images, labels))
    step = 0
    while True:
        images, labels = pool[step % 8]
        yield Batch(ImageViews.whole(images), labels, np.arange(count), step, count)
        step += 1


def ours(changes: dict[str, Any], sizes: dict[str, Any], device: torch.device) -> tuple[Callable[[], None], TrainStep]:
    """(a call that does one step, the TrainStep) of IRT_R with the recipe `paper`. One step has
    been done already, so that the compiler has run.

    changes: `transform` is called with the encoder; `inductor` are options of the compiler; the
    rest are options of the run.
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
    module = build_train_step(encoder, config, sizes["slots"], device, compile_options=inductor)
    # timm's LAMB: its own clipping off, as apex's is
    if "max_grad_norm" in module.optimizer.defaults:
        module.optimizer.defaults["max_grad_norm"] = None
    stream = batches(sizes["input_size"], sizes["batch_size"], device)
    module(next(stream))
    return lambda: module(next(stream)), module


def peer(sizes: dict[str, Any], device: torch.device) -> Callable[[], float]:
    """A call that does one step of the public recipe on normalized float32 batches."""
    torch.manual_seed(0)
    config = Config().replace(weights="scratch", model=sizes["model"])
    recipe = public_recipe.Recipe(build_encoder(config.model, sizes["input_size"]).vit, sizes["slots"], device)
    stream = batches(sizes["input_size"], sizes["batch_size"], device)
    floats = [
        (b.images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(), b.labels)
        for b, _ in zip(stream, range(2))
    ]
    count = iter(range(10**9))
    return lambda: recipe(*floats[next(count) % 2])


def contenders(device: torch.device) -> dict[str, dict[str, Any] | None]:
    """Options of each contender by name; None for the public recipe. The order is that of worth,
    since GPU time may end."""
    if device.type == "cuda":
        last = WATERFALL[LAST]
        others = {name: {**last, **changes} for name, changes in ABLATIONS.items()}
        found = {**WATERFALL, PUBLIC: None, **others}
        return {**{name: found[name] for name in (LAST, "graph, bf16 weights", "+ torch.compile", PUBLIC)}, **found}
    fp32 = {f"{engine} fp32": dict(engine=engine, precision="fp32") for engine in ("eager", "onednn", "compile")}
    bf16 = {} if bf16_units_missing() else {CPU_BF16: dict(engine="eager", precision="bf16")}
    return {**fp32, **bf16, PUBLIC: None}


def bf16_units_missing() -> str:
    """Why bf16 products gain nothing on this CPU; empty if it has instructions for them."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return ""
    if platform.machine() in ("aarch64", "arm64") and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ""
    return "this CPU has no bf16 products (AMX, AVX-512 BF16 or Arm's)"


def run(args: argparse.Namespace, results: Results) -> None:
    on_gpu = results.device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()  # as `fastirt train` does; the public recipe gains too
        for name in [*WATERFALL, *ABLATIONS][1:]:
            results.not_run("step", name, "needs a GPU")
        if why := bf16_units_missing():
            results.not_run("step", CPU_BF16, why)
    batch_sizes = args.batch_size or (([64] if args.quick else [64, 256]) if on_gpu else [8 if args.quick else 16])
    input_sizes = args.input_size or [224 if on_gpu else 32 if args.quick else 64]
    for batch_size, input_size in itertools.product(batch_sizes, input_sizes):
        sizes = dict(
            model=args.model or default_model(results.device),
            input_size=input_size,
            batch_size=batch_size,
            slots=args.slots or (59551 if on_gpu else 500 if args.quick else 2000),
        )
        _measure(args, sizes, results)


def _measure(args: argparse.Namespace, sizes: dict[str, Any], results: Results) -> None:
    """Time the waterfall's last row, then each other contender in turns with it, in the order of
    `contenders`. Each figure is written as it is measured, and the contender's memory freed."""
    wanted = {
        name: changes
        for name, changes in contenders(results.device).items()
        if name not in args.skip and (not args.only or name in args.only)
    }
    last: dict[str, Callable[[], Any]] = {}
    for due, _ in turns(list(wanted), results.device):
        kept = _group({name: wanted[name] for name in due}, last, args, sizes, results)
        last = {name: call for name, call in kept.items() if name == LAST}
        del kept
        release(results.device)
    last.clear()
    release(results.device)


def _group(
    named: dict[str, dict[str, Any] | None],
    beside: dict[str, Callable[[], Any]],
    args: argparse.Namespace,
    sizes: dict[str, Any],
    results: Results,
) -> dict[str, Callable[[], Any]]:
    """Add a figure for each of `named`, timed in turns with each other and with `beside`.

    Returns the calls that ran, those of `beside` included.
    """
    device, on_gpu = results.device, results.device.type == "cuda"
    calls = dict(beside)
    for name, changes in named.items():
        try:
            call = peer(sizes, device) if changes is None else ours(changes, sizes, device)[0]
            call()
            calls[name] = call
        except Exception as error:  # no apex, no compiler, no memory: the others still run
            results.not_run("step", _label(name), reason(error))
            release(device)
    steps = args.steps or (2 if args.quick else 20 if on_gpu else 3)
    timed = run_interleaved(calls, device, args.repeats or (2 if args.quick else 7), steps, 6 if on_gpu else 1)
    medians = {name: statistics.median(rounds.seconds) for name, rounds in timed.items() if isinstance(rounds, Rounds)}
    for name in named:
        rounds = timed.get(name)
        if isinstance(rounds, str):
            results.not_run("step", _label(name), rounds)
            calls.pop(name)
        elif rounds is not None:
            extra: dict[str, Any] = {"ms": 1e3 * medians[name], "peak_bytes": rounds.peak_bytes}
            extra["times_graph"] = medians[LAST] / medians[name] if LAST in medians else None
            momentum = bool(named[name]) and "encoder_momentum" in named[name]
            _write(name, rounds.seconds, momentum, extra, calls[name], sizes, results)
    return calls


def _write(
    name: str, seconds: list[float], momentum: bool, extra: dict[str, Any], call: Callable[[], Any],
    sizes: dict[str, Any], results: Results,
) -> None:  # fmt: skip
    """Add one contender's figure. momentum: it has a momentum encoder, whose forward counts."""
    precision = "bf16" if results.device.type == "cuda" or name == CPU_BF16 else "fp32"
    flops = operations(sizes["model"], sizes["input_size"], momentum)
    rates = [sizes["batch_size"] / value for value in seconds]
    limit = results.limits[precision] * 1e12 / flops if flops else None
    peak = peak_flops(results.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    extra["MFU"] = statistics.median(rates) * flops / peak if flops and peak else None  # of the data sheet, as in a log
    try:
        counts, kernel_us = profiled(call, results.device)
        extra |= counts
        if by_category := us_by_category(kernel_us, name, sizes):
            extra["us_by_category"] = by_category
    except Exception as error:  # the profiler failed: the figure stands without it
        print(f"step, {name}: no profile: {reason(error)}", flush=True)
    results.add(
        figure_of(
            rates, part="step", name=_label(name), unit="imgs/s", params=sizes, limit=limit,
            limit_name=f"{precision} products", extra=extra,
        )
    )  # fmt: skip


@functools.lru_cache
def operations(model: str, input_size: int, momentum: bool = False) -> int:
    """Floating-point operations of one image in a training step of this timm model; `momentum`:
    with a momentum encoder."""
    config = Config().replace(weights="scratch", model=model)
    return training_flops(build_encoder(config.model, input_size), momentum)


def _label(name: str) -> str:
    """The name that the results show."""
    return public_recipe.recipe_name() if name == PUBLIC else name
