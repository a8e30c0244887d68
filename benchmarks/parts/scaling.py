"""Ranks: the step measured on those that this machine has, and a model of it on more.

Every size runs in processes of its own, `python -m benchmarks.parts.scaling RANKS`, with the same number of pictures a rank. On a machine with
fewer GPUs than ranks, gloo and the CPU are what is measured. Figures named "model" are arithmetic, not measurements: see `predicted`.
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

from benchmarks.parts.step import batches
from benchmarks.report import MODEL
from benchmarks.results import Results, figure_of
from fastirt.config.options import Config
from fastirt.distributed.ranks import Ranks
from fastirt.model.build import build_encoder
from fastirt.step.train_step import build_train_step

MODELLED = (8, 64, 512)
BACKWARD = 2 / 3  # share of a step's arithmetic during which gradients can travel


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step-ms", type=float, help="of one rank, for the model (default: measured here)")
    parser.add_argument("--link-gb-s", type=float, default=400, help="each GPU's to its node (default: %(default)s)")
    parser.add_argument(
        "--network-gb-s", type=float, default=50, help="each GPU's to other nodes (default: %(default)s)"
    )
    parser.add_argument(
        "--link-latency-us", type=float, default=2, help="of a message in a node (default: %(default)s)"
    )
    parser.add_argument(
        "--network-latency-us", type=float, default=10, help="of one between nodes (default: %(default)s)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8)


def predicted(
    ranks: int, *, step_ms: float, gradient_bytes: float, exchange_bytes: float, rounds: int, link_gb_s: float,
    network_gb_s: float, link_latency_us: float, network_latency_us: float, gpus_per_node: int,
) -> float:  # fmt: skip
    """Milliseconds of a step of `ranks` GPUs, by a model of four assumptions.

    Compute takes `step_ms` whatever the number of ranks: each has its own pictures, and its own rows of the objective. Gradients
    are summed by a ring over the slowest link, 2 (W - 1) / W of `gradient_bytes` each way, hidden behind the backward. Embeddings,
    labels and sums of the other ranks, `exchange_bytes` from each, are not hidden. Each of the `rounds` of messages goes once around the
    ring of all ranks, and waits for each hop, in a node or between two.
    """
    if ranks == 1:
        return step_ms
    speed = (link_gb_s if ranks <= gpus_per_node else network_gb_s) * 1e9
    ring = 2 * (ranks - 1) / ranks * gradient_bytes / speed * 1e3
    exchange = (ranks - 1) * exchange_bytes / speed * 1e3
    nodes = -(-ranks // gpus_per_node)
    between = nodes if nodes > 1 else 0
    waits = rounds * (between * network_latency_us + (ranks - 1 - between) * link_latency_us) / 1e3
    return step_ms + max(0.0, ring - BACKWARD * step_ms) + exchange + waits


def run(args: argparse.Namespace, results: Results) -> None:
    on_gpu = results.device.type == "cuda"
    most = torch.cuda.device_count() if on_gpu else min(4, 2 * (os.cpu_count() or 1))
    sizes = [size for size in (1, 2, 4, 8) if size <= most]
    base: dict[str, Any] = {}
    for size in sizes[:2] if args.quick else sizes:
        for layout in ("whole", "sharded") if size > 1 else ("whole",):
            said = measure(size, layout, results.device, args)
            if isinstance(said, str):
                results.missing("scaling", f"{size} ranks, memory {layout}", said)
                continue
            rates = [said["pictures"] / seconds for seconds in said["seconds"]]
            base = base or said
            alone = statistics.median(base["seconds"]) if base["params"]["ranks"] == 1 else None
            extra = {
                "ms": 1e3 * statistics.median(said["seconds"]),
                "wire_mb": (said["wire"] - said["gradients_wire"]) / 1e6, "gradients_mb": said["gradients_wire"] / 1e6,
                "efficiency": alone / statistics.median(said["seconds"]) if alone else None,
            }  # fmt: skip
            results.add(
                figure_of(
                    rates,
                    part="scaling",
                    name=f"memory {layout}, {said['backend']}",
                    unit="imgs/s",
                    params=said["params"],
                    extra=extra,
                )
            )
    if not base:
        return
    if on_gpu:
        step_ms = args.step_ms or 1e3 * statistics.median(base["seconds"])
        step = dict(pictures=base["pictures"], dim=base["dim"], gradient_bytes=base["gradient_bytes"])
    elif args.step_ms:
        step_ms, step = args.step_ms, dict(pictures=64, dim=384, gradient_bytes=4 * 21.7e6)  # DeiT-S
    else:
        results.missing("scaling", "model", "a CPU's step says nothing of GPUs: give --step-ms")
        return
    _model(args, step_ms, **step, results=results)


def _model(
    args: argparse.Namespace, step_ms: float, pictures: int, dim: int, gradient_bytes: float, results: Results
) -> None:
    links = dict(
        step_ms=step_ms, gradient_bytes=gradient_bytes, link_gb_s=args.link_gb_s, network_gb_s=args.network_gb_s,
        link_latency_us=args.link_latency_us, network_latency_us=args.network_latency_us, gpus_per_node=args.gpus_per_node,
    )  # fmt: skip
    for layout in ("whole", "sharded"):
        # Of each rank: its rows, their labels, sums and neighbours; in shards, the gradients of its rows from every other rank.
        rows = pictures * dim * 4
        exchange = rows + pictures * 8 + 8 * (8 + 2 * pictures) + (rows if layout == "sharded" else 0)
        for ranks in MODELLED:
            ms = predicted(ranks, exchange_bytes=exchange, rounds=4 if layout == "sharded" else 3, **links)
            rate, params = 1e3 * ranks * pictures / ms, dict(ranks=ranks, pictures_a_rank=pictures, dim=dim, **links)
            wire = {
                "wire_mb": 2 * (ranks - 1) * exchange / 1e6,
                "gradients_mb": 4 * (ranks - 1) / ranks * gradient_bytes / 1e6,
            }
            extra = {"ms": ms, "efficiency": step_ms / ms, **wire}
            name = f"{MODEL}, memory {layout}"
            results.add(figure_of([rate], part="scaling", name=name, unit="imgs/s", params=params, extra=extra))


def measure(size: int, layout: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any] | str:
    """What rank 0 of `size` ranks says; words where they cannot run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {
        **os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.parts.scaling", layout, device.type, "quick" if args.quick else "full"]
    where = Path(__file__).parent.parent.parent
    ranks = [
        subprocess.Popen(
            command, cwd=where, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    except subprocess.TimeoutExpired:
        failed = next((rank for rank in ranks if rank.poll()), None)  # it may have left the others waiting
        return _last_words(failed, failed.communicate()[1]) if failed else "took more than five minutes"
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, said):
        if rank.returncode:
            return _last_words(rank, errors)
    return json.loads(said[0][0].splitlines()[-1])


def _last_words(rank: subprocess.Popen, errors: str) -> str:
    return (errors.strip().splitlines() or [f"exit code {rank.returncode}"])[-1][:200]


def main(layout: str, kind: str, effort: str) -> None:
    """One rank: times steps, in lockstep with the others; rank 0 prints what it found."""
    ranks = Ranks.from_environment()
    device = torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    ranks.start(device)
    full, on_gpu = effort == "full", kind == "cuda"
    model = "deit_small_patch16_224" if on_gpu else "vit_tiny_patch16_224"
    side, count, slots = (224, 64, 59551) if on_gpu else (64 if full else 32, 8, 2000)
    config = Config().replace(
        weights="scratch", model=model, max_iter=10**6, batch_size=count * ranks.world_size, memory_ratio=1.0,
        memory_sharded=layout == "sharded", engine="compile" if on_gpu else "eager",  # the same on one rank as on many
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
        if number:  # the first warms up
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
        gradients = sum(p.numel() * 4 for p in module.networks.weights)
        found = dict(
            seconds=seconds, pictures=count * ranks.world_size, wire=module.bytes_moved, gradient_bytes=gradients
        )
        found["gradients_wire"] = 4 * (ranks.world_size - 1) * gradients // ranks.world_size
        print(
            json.dumps(
                {**found, "dim": encoder.embed_dim, "backend": ranks.collectives.backend or "alone", "params": params}
            )
        )
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
