"""Made-up vectors with paths and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastirt.gallery import Gallery

COUNT, DIM = 300, 16


def unit(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """(count, dim) float32, rows of unit length."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def paths(count: int, prefix: str = "a") -> list[str]:
    return [f"{prefix}/{i}.jpg" for i in range(count)]


def metadata(count: int) -> dict[str, list[Any]]:
    return {
        "brand": [f"b{i % 7}" for i in range(count)],
        "price": [i % 100 for i in range(count)],
        "note": ["" if i % 2 else f"it's {i}" for i in range(count)],
    }


def made_up(folder: Path, count: int = COUNT, **options: Any) -> Gallery:
    """A gallery whose row i is `unit(count)[i]`, at a/i.jpg below /images."""
    options = {"metadata": metadata(count), "root": "/images", **options}
    return Gallery.from_vectors(unit(count), paths(count), folder, **options)
