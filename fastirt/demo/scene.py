"""A photograph of a product: viewpoint, light, color cast, background, occlusion and noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from fastirt.config.random_streams import stream
from fastirt.demo.product import SIDE, VIEW, Product

# Standard deviation of the log gain per color; with less, a color histogram finds half of the
# products.
CAST = 0.36
NOISE = 6.0  # standard deviation of the sensor noise, in levels of 255
GRAIN = 22.0  # the same of large images: it makes their files 80 KB instead of 30 KB


def take_photo(product: Product, seed: int, number: int, view: int, width: int, height: int) -> Image.Image:
    """Image `view` of class `number`, width × height pixels, RGB; deterministic."""
    rng = stream(seed, VIEW, number, view)
    factor = 1 if is_large(width, height) else 2  # small images are supersampled against aliasing
    size = (width * factor, height * factor)
    image = _background(rng, size, product.palette)
    image.paste(*_placed(rng, product, size))
    if rng.random() < 0.5:
        _occlude(rng, image)
    image = image.reduce(factor) if factor > 1 else image
    return _develop(rng, image)


def _placed(
    rng: np.random.Generator, product: Product, size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    """The product from a random viewpoint: (image, position (x, y), mask)."""
    tall = rng.uniform(0.8, 1.0) * min(size)
    high, wide = tall / 2, tall * product.aspect / 2
    corners = np.array([[-wide, -high], [wide, -high], [wide, high], [-wide, high]])
    corners = corners * (1 + rng.uniform(-0.06, 0.06, (4, 2)))  # tilt of the camera
    angle = np.radians(rng.uniform(-10, 10))
    corners = corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    room = np.maximum(np.array(size) / 2 - np.abs(corners).max(axis=0), 0)
    corners = corners + np.array(size) / 2 + rng.uniform(-0.6, 0.6, 2) * room
    low = np.floor(corners.min(axis=0)).astype(int)
    extent = np.ceil(corners.max(axis=0)).astype(int) - low + 1
    front = _front(product, max(1, int(SIDE / (1.2 * tall))))  # about the size in the image
    coefficients = _homography(corners - low, np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * front.size[0])
    seen = front.transform(
        tuple(map(int, extent)), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )
    seen = seen.convert("RGBA")
    return seen.convert("RGB"), (int(low[0]), int(low[1])), seen.getchannel("A")


@lru_cache(maxsize=8)
def _front(product: Product, step: int) -> Image.Image:
    """The front view, `step` times smaller, with premultiplied alpha as `transform` needs it."""
    return product.front.reduce(step).convert("RGBa")


def _homography(target: np.ndarray, source: np.ndarray) -> list[float]:
    """Pillow's eight coefficients that map target points (4, 2) back to source points (4, 2)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64)).tolist()


def _background(rng: np.random.Generator, size: tuple[int, int], palette: np.ndarray) -> Image.Image:
    """Smooth color patches with clutter, some of it in the product's colors."""
    patches = rng.integers(60, 196, (rng.integers(2, 6), rng.integers(2, 6), 3), dtype=np.uint8)
    image = Image.fromarray(patches).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 7)):
        color = palette[rng.integers(3)] if rng.random() < 0.3 else rng.integers(0, 256, 3)
        _blob(rng, draw, rng.uniform(0, 1, 2) * size, rng.uniform(0.08, 0.35) * min(size), tuple(map(int, color)))
    return image


def _occlude(rng: np.random.Generator, image: Image.Image) -> None:
    """Draws a blob in front of the product's edge."""
    size = np.array(image.size)
    angle = rng.uniform(0, 2 * np.pi)
    center = size / 2 + 0.33 * min(size) * np.array([np.cos(angle), np.sin(angle)])
    _blob(
        rng,
        ImageDraw.Draw(image),
        center,
        rng.uniform(0.1, 0.22) * min(size),
        tuple(map(int, rng.integers(0, 256, 3))),
    )


def _blob(rng: np.random.Generator, draw: ImageDraw.ImageDraw, center: np.ndarray, radius: float, color: tuple) -> None:
    x, y = center
    if rng.random() < 0.4:
        stretch = rng.uniform(0.4, 1.0)
        draw.ellipse([x - radius, y - radius * stretch, x + radius, y + radius * stretch], fill=color)
        return
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
    draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=color)


def _develop(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Light from one side, exposure, color cast and sensor noise."""
    width, height = image.size
    gain = (np.exp(rng.normal(0, CAST, 3)) * rng.uniform(0.65, 1.2)).astype(np.float32)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45)
    across = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(np.cos(angle) * strength)
    down = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(np.sin(angle) * strength)
    light = 1 + across[None, :] + down[:, None]  # (H, W)
    tile = _noise_tile(height, width)
    y, x = rng.integers(0, tile.shape[1] - height + 1), rng.integers(0, tile.shape[2] - width + 1)
    noise = tile[:, y : y + height, x : x + width] * np.float32(rng.uniform(0.5, 1.5))
    bands = []  # one by one, because NumPy is slow along an axis of three
    for band, band_gain, band_noise in zip(image.split(), gain, noise):
        lit = np.asarray(band) * (light * band_gain)
        lit += band_noise
        bands.append(Image.fromarray(np.clip(lit, 0, 255, out=lit).astype(np.uint8)))
    return Image.merge("RGB", bands)


def is_large(width: int, height: int) -> bool:
    """Whether images are drawn without supersampling, noisier, and saved with 4:2:0 chroma."""
    return min(width, height) >= 200


@lru_cache(maxsize=2)
def _noise_tile(height: int, width: int) -> np.ndarray:
    """(3, H + 128, W + 128) float32 noise, of which each image uses a random part."""
    sigma = GRAIN if is_large(width, height) else NOISE
    tile = np.random.default_rng(0).normal(0, sigma, (height + 128, width + 128, 3))
    return np.ascontiguousarray(tile.transpose(2, 0, 1), dtype=np.float32)
