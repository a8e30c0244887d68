"""A product from the front: silhouette, texture, palette and label, drawn from seed and number."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fastirt.config.random_streams import stream

SIDE = 512  # pixels of the front view
PALETTE, SHAPE, CLASS, VIEW, JPEG = 1, 2, 3, 4, 5  # purposes of random streams
TEXTURES = ("plain", "stripes", "checks", "dots", "waves", "triangles", "rings", "bricks")


@dataclass(frozen=True, eq=False)
class Product:
    """A class of the demo set.

    Classes 2n and 2n + 1 share a palette, classes 2n - 1 and 2n a silhouette, so that neither
    identifies a class.
    """

    front: Image.Image  # RGBA, SIDE x SIDE, transparent outside the silhouette
    aspect: float  # width / height
    palette: np.ndarray  # (3, 3) uint8


def make_product(seed: int, number: int) -> Product:
    """Class `number` of the demo set with this seed."""
    palette = _palette(stream(seed, PALETTE, number // 2))
    shape = stream(seed, SHAPE, (number + 1) // 2)
    aspect = float(shape.uniform(0.45, 1.05))
    mask = _silhouette(shape)
    rng = stream(seed, CLASS, number)
    order = rng.permutation(3)
    base, accent, label = palette[order]
    front = _textured(rng, base, accent)
    _label(front, rng, tuple(map(int, label)), tuple(map(int, base)))
    front.putalpha(mask)
    return Product(front, aspect, palette)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) uint8: three colors that differ in brightness or hue."""
    hue = rng.random()
    steps = (0, rng.uniform(0.15, 0.5), rng.uniform(0.5, 0.85))
    values = rng.permutation([rng.uniform(0.15, 0.4), rng.uniform(0.5, 0.7), rng.uniform(0.8, 1.0)])
    colors = [
        colorsys.hsv_to_rgb((hue + step) % 1, rng.uniform(0.2, 0.95), value) for step, value in zip(steps, values)
    ]
    return (np.array(colors) * 255).astype(np.uint8)


def _silhouette(rng: np.random.Generator) -> Image.Image:
    """A symmetric mask: widths at seven heights, joined by straight or smooth lines."""
    knots = np.linspace(0, 1, 7)
    widths = rng.uniform(0.35, 1.0, 7)
    if rng.random() < 0.4:
        widths[:2] = rng.uniform(0.15, 0.4)  # a neck
    if rng.random() < 0.3:
        widths[2:] = rng.uniform(0.7, 1.0)  # a box
    heights = np.linspace(0, 1, 64)
    profile = np.interp(heights, knots, widths)
    if rng.random() < 0.6:
        profile = np.convolve(np.pad(profile, 6, mode="edge"), np.ones(13) / 13, mode="valid")
    profile = profile / profile.max()
    left = [(SIDE / 2 * (1 - w), h * (SIDE - 1)) for w, h in zip(profile, heights)]
    right = [(SIDE - 1 - x, y) for x, y in reversed(left)]
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).polygon(left + right, fill=255)
    return mask


def _textured(rng: np.random.Generator, base: np.ndarray, accent: np.ndarray) -> Image.Image:
    """(SIDE, SIDE) RGB: the base color with a texture in the accent color."""
    kind = TEXTURES[rng.integers(len(TEXTURES))]
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(2.5, 7)
    share = rng.uniform(0.3, 0.6)
    u = np.arange(SIDE) / SIDE - 0.5  # (SIDE,)
    v = u[:, None]  # (SIDE, 1)
    if kind == "plain":
        blend = np.clip(v + 0.5, 0, 1) * rng.uniform(0, 0.6)
        column = (base * (1 - blend) + accent * blend).astype(np.uint8)  # (SIDE, 3)
        return Image.fromarray(np.repeat(column[:, None], SIDE, axis=1))
    field = _field(kind, u, v, angle, frequency, share)
    front = Image.new("RGB", (SIDE, SIDE), tuple(map(int, base)))
    front.paste(tuple(map(int, accent)), mask=Image.fromarray(field.astype(np.uint8) * 255))
    return front


def _field(kind: str, u: np.ndarray, v: np.ndarray, angle: float, frequency: float, share: float) -> np.ndarray:
    """(SIDE, SIDE) bool: where the texture has the accent color."""
    if kind == "rings":
        return _fraction(np.hypot(u, v) * frequency * 1.5) < share
    a = (u * np.cos(angle) + v * np.sin(angle)) * frequency
    if kind == "stripes":
        return _fraction(a) < share
    b = (v * np.cos(angle) - u * np.sin(angle)) * frequency
    if kind == "checks":
        return (np.floor(a) + np.floor(b)) % 2 == 0
    if kind == "dots":
        return np.hypot(_fraction(a) - 0.5, _fraction(b) - 0.5) < share * 0.75
    if kind == "waves":
        return _fraction(a + 0.35 * np.sin(2 * np.pi * b / 2)) < share
    if kind == "triangles":
        return _fraction(a) + _fraction(b) < 2 * share
    return (_fraction(b) < 0.85) & (_fraction(a + 0.5 * (np.floor(b) % 2)) < 0.85)  # bricks


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)  # several times faster than x % 1


def _label(front: Image.Image, rng: np.random.Generator, color: tuple, base: tuple) -> None:
    """Draws a label with a symmetric glyph, and often a band."""
    draw = ImageDraw.Draw(front)
    if rng.random() < 0.7:
        top, height = rng.uniform(0.05, 0.85), rng.uniform(0.05, 0.12)
        draw.rectangle([0, top * SIDE, SIDE, (top + height) * SIDE], fill=color)
    size = rng.uniform(0.42, 0.58) * SIDE
    x, y = (0.5 * SIDE - size / 2), rng.uniform(0.2, 0.75) * SIDE - size / 2
    if rng.random() < 0.5:
        draw.ellipse([x - size * 0.15, y - size * 0.15, x + size * 1.15, y + size * 1.15], fill=base)
    else:
        draw.rectangle([x - size * 0.1, y - size * 0.1, x + size * 1.1, y + size * 1.1], fill=base)
    half = rng.random((5, 3)) < 0.5
    half[rng.integers(5), rng.integers(3)] = True
    cell = size / 5
    for row in range(5):
        for column in range(5):
            if half[row, min(column, 4 - column)]:
                draw.rectangle(
                    [x + column * cell, y + row * cell, x + (column + 1) * cell, y + (row + 1) * cell], fill=color
                )
