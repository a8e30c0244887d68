"""A color histogram as a baseline: retrieval without shape, texture or labels.

python -m fastirt.demo.baseline DATA FOLDER     writes FOLDER/metrics.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image

BINS = 8  # per channel
CENTER = 0.5  # share of each side that is used


def color_histogram(paths: Sequence[str]) -> np.ndarray:
    """(N, BINS^3) float32 of length 1: the square root of the RGB histogram of each image's center.

    The inner product of two rows is Hellinger's kernel.
    """
    histograms = np.empty((len(paths), BINS**3), dtype=np.float32)
    for row, path in enumerate(paths):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        top, left = (round(side * (1 - CENTER) / 2) for side in (height, width))
        center = pixels[top : height - top, left : width - left].reshape(-1, 3).astype(np.int64)
        bins = center * BINS // 256
        counts = np.bincount(bins @ np.array([BINS * BINS, BINS, 1]), minlength=BINS**3)
        histograms[row] = np.sqrt(counts / counts.sum())
    return histograms


def main(data: str, folder: str) -> None:
    """Evaluate the baseline on the demo set in `data`; writes folder/metrics.json."""
    import torch

    from fastirt.config.run_files import RunFiles
    from fastirt.datasets import load_dataset
    from fastirt.retrieval.metrics import retrieval_metrics
    from fastirt.retrieval.report import write_metrics

    split = load_dataset("demo", data).query
    vectors, labels = torch.from_numpy(color_histogram(split.paths)), torch.from_numpy(split.labels)
    Path(folder).mkdir(parents=True, exist_ok=True)
    metrics = retrieval_metrics(vectors, labels, vectors, labels, (1, 2, 4, 8), exclude_self=True)
    write_metrics(RunFiles(Path(folder)).metrics, metrics)


if __name__ == "__main__":
    main(*sys.argv[1:])
