"""One photograph of a product: viewpoint, scale, light, colour cast, background, clutter, occlusion, sensor noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from fastirt.demo.product import SIDE, VIEW, Product, stream

NOISE = 6.0  # standard deviation of the sensor noise, in levels of 255
GRAIN = 15.0  # of the background's grain, which only large pictures show


def take_photo(product: Product, seed: int, number: int, view: int, width: int, height: int) -> Image.Image:
    """The picture `view` of class `number`, width x height pixels, RGB; the same for the same arguments."""
    rng = stream(seed, VIEW, number, view)
    factor = 2 if min(width, height) < 200 else 1  # small pictures are drawn larger, or edges would alias
    size = (width * factor, height * factor)
    picture = _background(rng, size, product.palette)
    picture.paste(*_placed(rng, product, size))
    if rng.random() < 0.5:
        _occlude(rng, picture)
    picture = picture.reduce(factor) if factor > 1 else picture
    return Image.fromarray(_develop(rng, np.asarray(picture)))


def _placed(rng: np.random.Generator, product: Product, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    """The product as seen from somewhere: (picture, where to paste it, its mask)."""
    tall = rng.uniform(0.72, 0.95) * min(size)
    high, wide = tall / 2, tall * product.aspect / 2
    corners = np.array([[-wide, -high], [wide, -high], [wide, high], [-wide, high]])
    corners = corners * (1 + rng.uniform(-0.08, 0.08, (4, 2)))  # a tilt of the camera
    angle = np.radians(rng.uniform(-18, 18))
    corners = corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    room = np.maximum(np.array(size) / 2 - np.abs(corners).max(axis=0), 0)
    corners = corners + np.array(size) / 2 + rng.uniform(-0.8, 0.8, 2) * room
    low = np.floor(corners.min(axis=0)).astype(int)
    extent = np.ceil(corners.max(axis=0)).astype(int) - low + 1
    step = max(1, int(SIDE / (1.2 * tall)))  # a front view about as large as it is shown
    front = _reduced(product, step)
    coefficients = _homography(corners - low, np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * front.size[0])
    seen = front.transform(tuple(map(int, extent)), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    return seen.convert("RGB"), (int(low[0]), int(low[1])), seen.getchannel("A")


def _reduced(product: Product, step: int) -> Image.Image:
    return product.front.reduce(step) if step > 1 else product.front


def _homography(target: np.ndarray, source: np.ndarray) -> list[float]:
    """The eight coefficients with which Pillow maps target points (4, 2) back to source points (4, 2)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64)).tolist()


def _background(rng: np.random.Generator, size: tuple[int, int], palette: np.ndarray) -> Image.Image:
    """Smooth colour patches with clutter, some of it in the product's own colours."""
    patches = rng.integers(20, 236, (rng.integers(2, 6), rng.integers(2, 6), 3), dtype=np.uint8)
    picture = Image.fromarray(patches).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(3, 10)):
        colour = palette[rng.integers(3)] if rng.random() < 0.3 else rng.integers(0, 256, 3)
        _blob(rng, draw, rng.uniform(0, 1, 2) * size, rng.uniform(0.08, 0.35) * min(size), tuple(map(int, colour)))
    return picture


def _occlude(rng: np.random.Generator, picture: Image.Image) -> None:
    """Something in front of the product's edge."""
    size = np.array(picture.size)
    angle = rng.uniform(0, 2 * np.pi)
    centre = size / 2 + 0.33 * min(size) * np.array([np.cos(angle), np.sin(angle)])
    _blob(rng, ImageDraw.Draw(picture), centre, rng.uniform(0.1, 0.22) * min(size), tuple(map(int, rng.integers(0, 256, 3))))


def _blob(rng: np.random.Generator, draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, colour: tuple) -> None:
    x, y = centre
    if rng.random() < 0.4:
        stretch = rng.uniform(0.4, 1.0)
        draw.ellipse([x - radius, y - radius * stretch, x + radius, y + radius * stretch], fill=colour)
        return
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
    draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=colour)


def _develop(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Light from one side, exposure, colour cast and sensor noise: (H, W, 3) uint8 to the same."""
    height, width, _ = pixels.shape
    gain = np.exp(rng.normal(0, 0.28, 3)) * rng.uniform(0.65, 1.2)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45)
    across = np.linspace(-1, 1, width, dtype=np.float32) * (np.cos(angle) * strength)
    down = np.linspace(-1, 1, height, dtype=np.float32) * (np.sin(angle) * strength)
    light = 1 + across[None, :] + down[:, None]  # (H, W)
    lit = pixels * (light[..., None] * gain.astype(np.float32))
    lit += _noise(rng, height, width)
    return np.clip(lit, 0, 255, out=lit).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32, cut at a random place from a tile made once."""
    tile = _noise_tile(height, width)
    y, x = rng.integers(0, tile.shape[0] - height + 1), rng.integers(0, tile.shape[1] - width + 1)
    return tile[y:y + height, x:x + width] * np.float32(rng.uniform(0.5, 1.5))


@lru_cache(maxsize=2)
def _noise_tile(height: int, width: int) -> np.ndarray:
    sigma = NOISE if min(height, width) < 200 else GRAIN
    return np.random.default_rng(0).normal(0, sigma, (height + 128, width + 128, 3)).astype(np.float32)
