"""Every random number of fastirt: a stream for each purpose, a function of the seed and of counters such as step and position.

Runs repeat, resume and spread over ranks because nothing else is drawn from. Changing a number here changes what every
stored checkpoint would have gone on to draw.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of the loader is for."""

    SHUFFLE = 101
    REPLACE = 102
    CLASSES = 103
    MEMBERS = 104
    CROPS = 105


DROP_PATH = {"encoder": 0x57, "momentum_encoder": 0x7A}


def stream(seed: int, *counters: int) -> np.random.Generator:
    """Random numbers that are a function of (seed, counters): a purpose, then step, epoch or position."""
    return np.random.default_rng([seed & (2**64 - 1), *map(int, counters)])


def drop_path_stream(seed: int, step: int, model: str) -> np.random.Generator:
    """For the drop-path masks of a step. model: a key of DROP_PATH. Philox (Salmon et al. 2011), keyed by (seed, model)."""
    key = np.array([seed, DROP_PATH[model]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))


def torch_seed(seed: int, step: int, rank: int) -> int:
    """For dropout inside the model, the one random thing that depends on the number of ranks."""
    return int(np.random.SeedSequence([seed, step, *([rank] if rank else [])]).generate_state(1)[0])
