"""Confidence intervals by the bootstrap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap_intervals(values: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """The 95 % interval of the mean of each column, from means over rows drawn with replacement.

    The percentile bootstrap: Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter
    13. All columns have the same draws.

    Args:
        values: (N, M) float64, N > 0.
        seed: of the draws.
        resamples: number of means.

    Returns:
        (M, 2) float64: lower and upper end.
    """
    rng, rows, data = np.random.default_rng(seed), len(values), values.numpy()
    means = np.empty((resamples, data.shape[1]))
    # One draw at a time: its counts stay in the processor's cache.
    for i in range(resamples):
        means[i] = np.bincount(rng.integers(rows, size=rows), minlength=rows) @ data / rows
    ends = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return torch.from_numpy(ends.T)
