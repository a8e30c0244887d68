"""Encoded images of many kinds, and what the readers make of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastirt.config.options import Config, InputConfig
from fastirt.datasets import Catalog, Split
from fastirt.images.pack import PackedStore, pack
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.train_loader import train_loader

# subprocesses import this module: importing tests.helpers would cost them seconds
CPU = torch.device("cpu")
SIDE = 24


def photo(height: int = SIDE, width: int = SIDE, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.clip(np.asarray(rough) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def with_alpha(mode: str = "RGBA") -> Image.Image:
    image = photo()
    image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)))
    return image.convert(mode)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(seed: int, size: tuple[int, int]) -> Image.Image:
    """Colours without noise, (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(data: bytes, chunk: bytes, behind_pixels: bool = False) -> bytes:
    at = len(data) - 12 if behind_pixels else 33
    return data[:at] + chunk + data[at:]


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    head = b"".join(struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body for marker, body in segments)
    return data[:2] + head + data[2:]


def jpeg_without(data: bytes, marker: int) -> bytes:
    at = data.index(bytes((0xFF, marker)))
    return data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :]


def write(folder: Path, files: list[bytes]) -> Split:
    """A split of these files, whose names say nothing about their kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.jpg" for number in range(len(files))]
    for path, data in zip(paths, files):
        path.write_bytes(data)
    return Split("train", tuple(map(str, paths)), np.zeros(len(files), np.int64))


def catalog_of(split: Split) -> Catalog:
    return Catalog("csv", str(Path(split.paths[0]).parent), split, None, None, ("class",))


def config(**options) -> InputConfig:
    return InputConfig(**{**dict(input_size=SIDE, resize_size=SIDE, num_workers=2), **options})


def read(split: Split, store=None, **options) -> dict[int, np.ndarray]:
    """Row to pixels (S, S, 3), of the rows that could be read."""
    loader = EvalLoader(split, batch_size=64, input=config(**options), device=CPU, store=store)
    return {int(row): batch.images[i].numpy() for batch in loader for i, row in enumerate(batch.indices[: batch.valid])}


def read_cached(split: Split, **options) -> dict[int, np.ndarray]:
    """Row to whole pixels (H, W, 3) as the decoded cache holds them."""
    given = dict(input_size=SIDE, resize_size=SIDE, num_workers=2, batch_size=8, m=0, cache="host")
    images = train_loader(catalog_of(split), Config().replace(**{**given, **options}), CPU).images
    for _ in images.fill(step=0):
        pass
    cache = images.cache
    starts = cache.starts.tolist()
    rows = np.flatnonzero(cache.valid).tolist()
    return {
        row: cache.pixels[starts[row] :][: cache.shapes[row].prod() * 3].reshape(*cache.shapes[row], 3).numpy()
        for row in rows
    }


def packed(split: Split, out: Path, **options):
    """The packed store of one split."""
    options = {**dict(resize_size=SIDE, quality=100, workers=1, progress=False), **options}
    return PackedStore.open(pack(catalog_of(split), out, **options)).split(split)


def store_of(catalog: Catalog, out: Path, **options) -> PackedStore:
    """The packed store of a whole data set."""
    options = {"resize": "square", "resize_size": 32, "progress": False, **options}
    return PackedStore.open(pack(catalog, out, **options))
