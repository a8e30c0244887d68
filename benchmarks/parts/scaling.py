"""The step on several ranks: measured on this machine, and predicted by a model for more ranks.

Every number of ranks runs in processes of its own (`main`), with the same number of images a rank:
on a machine with GPUs one rank a GPU, otherwise gloo on the CPU. Figures whose name starts with
"model" are arithmetic, not measurements: see `predicted`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts.step import batches, default_model
from benchmarks.report import MODEL
from benchmarks.results import Results, figure_of
from fastirt.config.options import Config
from fastirt.distributed.ranks import Ranks
from fastirt.model.build import build_encoder
from fastirt.step.train_step import build_train_step

MODELLED = (8, 64, 512)
BACKWARD = 2 / 3  # the backward's share of a step: gradients are exchanged while it runs


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step-ms", type=float, help="the model: step of one rank (default: measured here)")
    parser.add_argument(
        "--link-gb-s",
        type=float,
        default=400,
        help="the model: bandwidth from each GPU to its node (default: %(default)s)",
    )
    parser.add_argument(
        "--network-gb-s",
        type=float,
        default=50,
        help="the model: bandwidth from each GPU to other nodes (default: %(default)s)",
    )
    parser.add_argument(
        "--link-latency-us",
        type=float,
        default=2,
        help="the model: latency of a message in a node (default: %(default)s)",
    )
    parser.add_argument(
        "--network-latency-us",
        type=float,
        default=10,
        help="the model: latency of a message between nodes (default: %(default)s)",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="the model (default: %(default)s)")


def predicted(
    ranks: int, *, step_ms: float, gradient_bytes: float, exchange_bytes: float, rounds: int, link_gb_s: float,
    network_gb_s: float, link_latency_us: float, network_latency_us: float, gpus_per_node: int,
) -> float:  # fmt: skip
    """Milliseconds of a step on W = `ranks` GPUs, by a model of four assumptions:

    1. Compute takes `step_ms` for any W: each rank has its own images and rows of the objective.
    2. A ring over the slowest link sums the gradients: 2 (W - 1) / W of `gradient_bytes` each way,
       hidden behind the backward.
    3. Embeddings, labels and sums of the other ranks, `exchange_bytes` from each, are not hidden.
    4. Each of `rounds` messages goes once around the ring of all ranks and waits for the latency of
       each hop, within a node or between nodes.
    """
    if ranks == 1:
        return step_ms
    speed = (link_gb_s if ranks <= gpus_per_node else network_gb_s) * 1e9
    ring = 2 * (ranks - 1) / ranks * gradient_bytes / speed * 1e3
    exchange = (ranks - 1) * exchange_bytes / speed * 1e3
    nodes = -(-ranks // gpus_per_node)
    hops_between = nodes if nodes > 1 else 0
    waits = rounds * (hops_between * network_latency_us + (ranks - 1 - hops_between) * link_latency_us) / 1e3
    return step_ms + max(0.0, ring - BACKWARD * step_ms) + exchange + waits


def run(args: argparse.Namespace, results: Results) -> None:
    on_gpu = results.device.type == "cuda"
    base = _measure_all(args, results)
    if not base:
        return
    if on_gpu:
        step_ms = args.step_ms or 1e3 * statistics.median(base["seconds"])
        step = dict(images=base["images"], dim=base["dim"], gradient_bytes=base["gradient_bytes"])
    elif args.step_ms:
        step_ms, step = args.step_ms, dict(images=64, dim=384, gradient_bytes=4 * 21.7e6)  # DeiT-S
    else:
        results.not_run("scaling", "model", "the model is of GPUs, and no GPU was measured: give --step-ms")
        return
    _model(args, step_ms, **step, results=results)


def _measure_all(args: argparse.Namespace, results: Results) -> dict[str, Any]:
    """Add a figure for each number of ranks and layout of the memory. Returns the first outcome of
    `measure`; {} if none could run."""
    on_gpu = results.device.type == "cuda"
    most = torch.cuda.device_count() if on_gpu else min(4, 2 * (os.cpu_count() or 1))
    sizes = [size for size in (1, 2, 4, 8) if size <= most]
    base: dict[str, Any] = {}
    for size in sizes[:2] if args.quick else sizes:
        for layout in ("whole", "sharded") if size > 1 else ("whole",):
            outcome = measure(size, layout, results.device, args)
            if isinstance(outcome, str):
                results.not_run("scaling", f"{size} ranks, memory {layout}", outcome)
                continue
            base = base or outcome
            rates = [outcome["images"] / seconds for seconds in outcome["seconds"]]
            seconds, gradients_moved = statistics.median(outcome["seconds"]), outcome["gradient_bytes_moved"]
            extra = {
                "ms": 1e3 * seconds,
                "wire_mb": (outcome["bytes_moved"] - gradients_moved) / 1e6, "gradients_mb": gradients_moved / 1e6,
                "efficiency": statistics.median(base["seconds"]) / seconds if base["params"]["ranks"] == 1 else None,
            }  # fmt: skip
            name, params = f"memory {layout}, {outcome['backend']}", outcome["params"]
            results.add(figure_of(rates, part="scaling", name=name, unit="imgs/s", params=params, extra=extra))
    return base


def _model(
    args: argparse.Namespace, step_ms: float, images: int, dim: int, gradient_bytes: float, results: Results
) -> None:
    """Add the model's figures for MODELLED ranks; `images` are those of each rank."""
    links = dict(
        step_ms=step_ms, gradient_bytes=gradient_bytes, link_gb_s=args.link_gb_s, network_gb_s=args.network_gb_s,
        link_latency_us=args.link_latency_us, network_latency_us=args.network_latency_us,
        gpus_per_node=args.gpus_per_node,
    )  # fmt: skip
    for layout in ("whole", "sharded"):
        # From each rank: its rows, their labels, sums and neighbours. With a sharded memory every
        # other rank also returns a part of the gradient of its rows.
        rows = images * dim * 4
        exchange = rows + images * 8 + 8 * (8 + 2 * images) + (rows if layout == "sharded" else 0)
        for ranks in MODELLED:
            ms = predicted(ranks, exchange_bytes=exchange, rounds=4 if layout == "sharded" else 3, **links)
            rate, params = 1e3 * ranks * images / ms, dict(ranks=ranks, pictures_a_rank=images, dim=dim, **links)
            wire = {
                "wire_mb": 2 * (ranks - 1) * exchange / 1e6,
                "gradients_mb": 4 * (ranks - 1) / ranks * gradient_bytes / 1e6,
            }
            extra = {"ms": ms, "efficiency": step_ms / ms, **wire}
            name = f"{MODEL}, memory {layout}"
            results.add(figure_of([rate], part="scaling", name=name, unit="imgs/s", params=params, extra=extra))


def measure(size: int, layout: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any] | str:
    """The JSON that rank 0 of `size` ranks prints (see `main`); a string if they cannot run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {
        **os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.parts.scaling", layout, device.type, "quick" if args.quick else "full"]
    root = Path(__file__).parent.parent.parent
    ranks = [
        subprocess.Popen(
            command, cwd=root, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    except subprocess.TimeoutExpired:
        # the others may be waiting for it
        failed = next((rank for rank in ranks if rank.poll()), None)
        return _last_error_line(failed, failed.communicate()[1]) if failed else "took more than five minutes"
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, outputs):
        if rank.returncode:
            return _last_error_line(rank, errors)
    return json.loads(outputs[0][0].splitlines()[-1])


def _last_error_line(rank: subprocess.Popen, errors: str) -> str:
    return (errors.strip().splitlines() or [f"exit code {rank.returncode}"])[-1][:200]


def main(layout: str, kind: str, effort: str) -> None:
    """One rank: times steps in lockstep with the others. Rank 0 prints one line of JSON.

    layout: of the memory, "whole" or "sharded". kind: "cuda" or "cpu". effort: "full" or "quick".
    """
    ranks = Ranks.from_environment()
    device = torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    ranks.start(device)
    full, on_gpu = effort == "full", kind == "cuda"
    model = default_model(device)
    side, count, slots = (224, 64, 59551) if on_gpu else (64 if full else 32, 8, 2000)
    config = Config().replace(
        weights="scratch", model=model, max_iter=10**6, batch_size=count * ranks.world_size, memory_ratio=1.0,
        memory_sharded=layout == "sharded",
        engine="compile" if on_gpu else "eager",  # the same for one rank as for several
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = build_encoder(config.model, side)
    module = build_train_step(encoder, config, slots, device, ranks)
    stream, steps = batches(side, count, device), (20 if on_gpu else 4) if full else 2
    seconds = []
    for number in range(8 if full else 3):
        ranks.host.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            module(next(stream))
        if on_gpu:
            torch.cuda.synchronize()
        if number:  # the first is warm-up
            seconds.append((time.perf_counter() - start) / steps)
    if ranks.is_main:
        params = dict(
            model=model,
            input_size=side,
            pictures_a_rank=count,
            slots=slots,
            ranks=ranks.world_size,
            engine=module.engine.name,
        )
        gradient_bytes = sum(p.numel() * 4 for p in module.networks.weights)
        outcome = dict(
            seconds=seconds,
            images=count * ranks.world_size,
            bytes_moved=module.bytes_moved,
            gradient_bytes=gradient_bytes,
            gradient_bytes_moved=4 * (ranks.world_size - 1) * gradient_bytes // ranks.world_size,
            dim=encoder.embed_dim,
            backend=ranks.collectives.backend or "alone",
        )
        print(json.dumps({**outcome, "params": params}))
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
