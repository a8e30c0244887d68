"""From cached images to the step's input buffer: one kernel, beside plain PyTorch."""

from __future__ import annotations

import argparse
import statistics
from typing import Any, Callable

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks.results import Results, figure_of
from benchmarks.timing import as_cuda_graph, reason, release, time_interleaved, turns
from fastirt.images.normalize import byte_table
from fastirt.kernels import gather_views
from fastirt.loading.image_cache import ImageCache

# Random bytes that are repeated to fill a cache. Their odd number keeps images from being equal.
TILE = (1 << 22) + 7
# Images in page-locked memory. Their number does not matter to the rate; more take long to fill.
HOST_IMAGES = 4000


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", "--pictures", type=int, help="images in the cache (default: 59551; on a CPU 2000)")
    parser.add_argument("--side", type=int, default=256, help="pixels of a cached image (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, nargs="+", help="(default: 64 256; on a CPU 64)")


def indexed(out: torch.Tensor, cache: ImageCache, side: int, crops: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`gather_views` by advanced indexing: what a user of torch alone would write.

    out (B, S, S, 3); crops (B, 4) int64: row in the cache, top, left, flip; table (256, 3).
    """
    size, device = out.shape[1], crops.device
    row, top, left, flip = crops.unbind(1)
    across = torch.arange(size, device=device)
    y = top[:, None] + across
    x = left[:, None] + torch.where(flip[:, None] != 0, size - 1 - across, across)
    images = cache.pixels.view(-1, side, side, 3)
    views = images[row[:, None, None], y[:, :, None], x[:, None, :]]
    return out.copy_(table[views.long(), torch.arange(3, device=device)])


def fill(pixels: torch.Tensor) -> None:
    """Fill with random bytes: repeats of TILE, since drawing all of them is slow on a CPU."""
    tile = torch.randint(0, 256, (TILE,), dtype=torch.uint8, device=pixels.device)
    for start in range(0, len(pixels), TILE):
        part = pixels[start : start + TILE]
        part.copy_(tile[: len(part)])


def run(args: argparse.Namespace, results: Results) -> None:
    device, on_gpu = results.device, results.device.type == "cuda"
    count = args.images or (200 if args.quick else 59551 if on_gpu else 2000)
    for place in ("device", "host") if on_gpu else ("host",):
        images = min(count, HOST_IMAGES) if on_gpu and place == "host" else count
        try:
            cache = ImageCache(np.full((images, 2), args.side, np.int64), device, place)
            fill(cache.pixels)
            for batch_size in args.batch_size or ([64, 256] if on_gpu else [8 if args.quick else 64]):
                _measure(args, cache, place, batch_size, results)
        except Exception as error:
            results.not_run("cache", f"fastirt, {place}", reason(error))
        cache = None
        release(device)
    if not on_gpu:
        results.not_run("cache", "fastirt, device", "needs a GPU")


def _measure(args: argparse.Namespace, cache: ImageCache, place: str, batch_size: int, results: Results) -> None:
    device = results.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rng = np.random.default_rng(0)
    corners = rng.integers(0, args.side - args.crop + 1, (batch_size, 2))
    columns = [rng.integers(0, len(cache.valid), batch_size), corners, rng.integers(0, 2, batch_size)]
    crops = torch.from_numpy(np.column_stack(columns).astype(np.int64)).to(device)
    table = byte_table(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, dtype, device)
    out, plain = (torch.empty(batch_size, args.crop, args.crop, 3, dtype=dtype, device=device) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        f"fastirt, {place}": lambda: gather_views(out, cache.pixels, cache.starts, cache.widths, crops, table)
    }
    if cache.pixels.device == device:
        calls["torch indexing"] = lambda: indexed(plain, cache, args.side, crops, table)
        for call in calls.values():
            call()
        if not torch.equal(out, plain):
            raise RuntimeError("the kernel and plain indexing differ")
    if device.type == "cuda":  # in graphs: a launch from Python takes longer than the kernel
        for name, call in list(calls.items()):
            try:
                calls[name] = as_cuda_graph(call)
            except Exception as error:
                results.not_run("cache", name, reason(error))
                del calls[name]
    values_per_image = out.numel() // batch_size  # stored as one byte each
    bytes_per_image = values_per_image * (1 + out.element_size())  # read and written
    over_bus = place == "host" and device.type == "cuda"
    if over_bus:
        limit = results.limits["h2d GB/s"] * 1e9 / values_per_image
    else:
        limit = results.limits["GB/s"] * 1e9 / bytes_per_image
    params = dict(
        batch_size=batch_size, pictures=len(cache.valid), side=args.side, crop=args.crop, dtype=str(dtype)[6:]
    )
    repeats = args.repeats or (3 if args.quick else 20)
    for due, together in turns(list(calls), device):
        group = {name: calls[name] for name in together}
        timed, _ = time_interleaved(group, device, repeats, graphs=group if device.type == "cuda" else ())
        for name in due:
            values = timed[name]
            if isinstance(values, str):
                results.not_run("cache", name, values)
                continue
            ms = statistics.median(values)
            results.add(
                figure_of(
                    [batch_size / value * 1e3 for value in values], part="cache", name=name, unit="imgs/s",
                    params=params, limit=limit,
                    limit_name="copy bandwidth from the host" if over_bus else "copy bandwidth",
                    extra={"ms": ms, "GB/s": batch_size * bytes_per_image / ms / 1e6},
                )
            )  # fmt: skip
