"""Whether the decoded images of a run fit into the device's or the host's memory."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images.prepare import stored_size
from fastirt.images.resize_crop import check_shape, resized_size
from fastirt.images.source import ImageSource
from fastirt.loading.image_cache import ImageCache

log = logging.getLogger("fastirt")


# The share of the free memory that `auto` may take; training needs the rest.
AUTO_MEMORY_FRACTION = {"device": 0.4, "host": 0.5}
# The same for the images to evaluate on, of what is free beside the training images.
EVAL_MEMORY_FRACTION = {"device": 0.2, "host": 0.25}


def make_cache(
    where: str,
    source: ImageSource,
    input: InputConfig,
    device: torch.device,
    bad: frozenset[int] = frozenset(),
    ranks: Ranks = SINGLE_PROCESS,
) -> ImageCache | None:
    """The cache that `--cache` asks for, or None. A collective call.

    Args:
        where: "device", "host", "none" or "auto": the device's memory if AUTO_MEMORY_FRACTION of
            its free part is enough, else the host's on the same condition, else none.
        source: the P images.
        input: resize, orientation and threads.
        device: the device that gathers the views.
        bad: rows known to be unreadable; they get no memory.
        ranks: each keeps all images; all must call this function.

    Raises:
        UserError: the images do not fit where they must go.
    """
    if where == "none":
        return None
    places = ("device", "host") if device.type == "cuda" else ("host",)  # a CPU has one memory
    where = "host" if where == "device" and "device" not in places else where
    smallest = len(source) * input.resize_size**2 * 3
    mine = {place: free_memory(place, device) for place in places}
    if "host" in mine and ranks.is_distributed:  # each rank of a node keeps all images
        mine["host"] //= ranks.local_world_size
    everyone = ranks.host.gather_json(mine)  # before any of them takes its share
    room = {place: min(other.get(place, 0) for other in everyone) for place in places}
    fits = [place for place in places if smallest <= AUTO_MEMORY_FRACTION[place] * room[place]]
    if where == "auto" and not fits:
        _say_none(smallest, room)
        return None
    shapes = image_shapes(source, input, bad, ranks)
    # A rank that cannot see some file needs less: all must decide alike.
    needed = max(ranks.host.gather_json(int(shapes.prod(1).sum()) * 3))
    if where == "auto":
        where = next((place for place in fits if needed <= AUTO_MEMORY_FRACTION[place] * room[place]), "none")
        if where == "none":
            _say_none(needed, room)
            return None
    elif needed > 0.95 * room[where]:
        raise ranks.shared_error(
            f"--cache {where}: {needed / 2**30:.1f} GiB of images, {room[where] / 2**30:.1f} GiB are free: "
            "use --cache auto or none"
        )
    log.info("cache: %d images, %.2f GiB in %s memory", len(source), needed / 2**30, _NAMES[where])
    return ImageCache(shapes, device, where)


class EvalCaches:
    """The center crops of the splits that a run evaluates on more than once, each rank's part.

    Crops are kept if all of a rank's fit in EVAL_MEMORY_FRACTION of the memory that is free at the
    first evaluation: on the device or on the host as `--cache` says. Each rank decides by itself.

    training: the cache of the training images, whose missing ones must still fit; None without one.
    """

    training: ImageCache | None = None

    def __init__(self, input: InputConfig, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.input, self.device, self.ranks = input, device, ranks
        self._caches: dict[str, ImageCache] | None = None

    def of(self, counts: dict[str, int]) -> dict[str, ImageCache]:
        """The caches by the split's name, the same ones at each call; empty if they do not fit.

        counts: images of each split that this rank embeds.
        """
        if self._caches is None:
            side, count = self.input.input_size, sum(counts.values())
            needed = count * side**2 * 3
            place = self._place(needed)
            if place is None:
                log.info("cache: none for evaluation, which decodes %d images each time", count)
                self._caches = {}
            else:
                where = _NAMES[place]
                log.info("cache: %d images of evaluation, %.2f GiB in %s memory", count, needed / 2**30, where)
                shapes = {name: np.full((part, 2), side, np.int64) for name, part in counts.items()}
                self._caches = {name: ImageCache(shape, self.device, place) for name, shape in shapes.items()}
        return self._caches

    def _place(self, needed: int) -> str | None:
        """Where `needed` bytes fit: "device", "host", or None."""
        asked = self.input.cache
        if self.device.type == "cuda":
            places = {"auto": ("device", "host"), "none": ()}.get(asked, (asked,))
        else:
            places = () if asked == "none" else ("host",)
        for place in places:
            room = free_memory(place, self.device)
            if place == "host":
                room //= self.ranks.local_world_size
                room -= self.training.untouched_bytes if self.training is not None else 0
            if needed <= EVAL_MEMORY_FRACTION[place] * room:
                return place
        return None


_NAMES = {"device": "the device's", "host": "the host's"}


def _say_none(needed: int, room: dict[str, int]) -> None:
    free = ", ".join(f"{_NAMES[place]} has {bytes / 2**30:.1f} GiB free" for place, bytes in room.items())
    log.info("cache: none, %.1f GiB of images are too much (%s): every epoch decodes them again", needed / 2**30, free)


def free_memory(place: str, device: torch.device) -> int:
    """Bytes that can be allocated now on the "device" or the "host"; a container's limit counts."""
    if place == "device":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if (most := _text(limit).strip()).isdigit() and (now := _text(used).strip()).isdigit():
            files = [
                line.split()[1]
                for line in _text(f"{Path(limit).parent}/memory.stat").splitlines()
                if "inactive_file" in line
            ]
            # The operating system frees pages of cached files when needed.
            cached_files = int(files[-1] if files else 0)
            free = min(free, int(most) - int(now) + cached_files)
    return max(free, 0)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def image_shapes(
    source: ImageSource, input: InputConfig, bad: frozenset[int] = frozenset(), ranks: Ranks = SINGLE_PROCESS
) -> np.ndarray:
    """(P, 2) int64 (height, width) after the resize; (0, 0) for bad images.

    Headers of files are read only with `--resize shorter`, where the shapes depend on them.
    """
    count, side = len(source), input.resize_size
    if input.resize == "square":
        shapes = np.full((count, 2), side, np.int64)
        shapes[list(bad)] = 0
        return shapes
    with ThreadPoolExecutor(ranks.threads(input.num_workers)) as pool:
        sizes = pool.map(
            lambda row: (0, 0) if row in bad else _size(source, row, input.orientation), range(count), chunksize=64
        )
        resized = [resized_size(*size, input.resize, side) if size[0] else (0, 0) for size in sizes]
        return np.array(resized, np.int64).reshape(-1, 2)


def _size(source: ImageSource, row: int, orientation: str) -> tuple[int, int]:
    """(height, width) before the resize, upright with orientation "exif".

    (0, 0) for an unreadable image; it is reported when it is first read.
    """
    if hasattr(source, "size"):  # a packed store knows
        return source.size(row)
    try:
        height, width = stored_size(source.path(row), orientation)
        check_shape(height, width, "shorter")
    except Exception:  # Pillow raises nearly anything on a broken file
        return 0, 0
    return height, width
