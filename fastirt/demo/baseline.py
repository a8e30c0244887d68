"""A colour histogram as a baseline: what can be found without looking at shape, texture or marks.

python -m fastirt.demo.baseline DATA FOLDER     writes FOLDER/metrics.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image

BINS = 8  # per channel
CENTRE = 0.5  # share of each side that is looked at


def colour_histogram(paths: Sequence[str]) -> np.ndarray:
    """(N, BINS^3) float32, rows of length 1: the square root of the RGB histogram of each image's centre (Hellinger's kernel)."""
    histograms = np.empty((len(paths), BINS**3), dtype=np.float32)
    for row, path in enumerate(paths):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        margin = [round(side * (1 - CENTRE) / 2) for side in pixels.shape[:2]]
        centre = (
            pixels[margin[0] : pixels.shape[0] - margin[0], margin[1] : pixels.shape[1] - margin[1]]
            .reshape(-1, 3)
            .astype(np.int64)
        )
        bins = centre * BINS // 256
        counts = np.bincount(bins @ np.array([BINS * BINS, BINS, 1]), minlength=BINS**3)
        histograms[row] = np.sqrt(counts / counts.sum())
    return histograms


def main(data: str, folder: str) -> None:
    import torch

    from fastirt.datasets import load_dataset
    from fastirt.retrieval.metrics import retrieval_metrics
    from fastirt.retrieval.report import write_metrics

    split = load_dataset("demo", data).query
    vectors, labels = torch.from_numpy(colour_histogram(split.paths)), torch.from_numpy(split.labels)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_metrics(
        Path(folder) / "metrics.json", retrieval_metrics(vectors, labels, vectors, labels, (1, 2, 4, 8), same=True)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
