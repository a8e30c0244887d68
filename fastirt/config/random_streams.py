"""All random numbers of fastirt: streams by purpose, keyed by seed and counters such as the step.

Runs repeat, resume and scale over ranks because there is no other source of randomness. Changing a
constant here changes the future draws of every stored checkpoint.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Streams of the loader and of sweeps."""

    SHUFFLE = 101
    REPLACE = 102
    CLASSES = 103
    MEMBERS = 104
    CROPS = 105
    AUGMENT = 106
    SETTINGS = 201
    VALIDATION_CLASSES = 202


DROP_PATH = {"encoder": 0x57, "momentum_encoder": 0x7A}


def stream(seed: int, *counters: int) -> np.random.Generator:
    """A generator keyed by (seed, counters): a purpose, then step, epoch or position."""
    return np.random.default_rng([seed & (2**64 - 1), *map(int, counters)])


def drop_path_stream(seed: int, step: int, model: str) -> np.random.Generator:
    """The drop-path masks of a step: Philox (Salmon et al. 2011), keyed by (seed, model).

    model: a key of DROP_PATH.
    """
    key = np.array([seed, DROP_PATH[model]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))


def seed_torch(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device` for a step.

    `torch.manual_seed` would do the same 100 times slower: it formats stack traces for backends
    that are not there.
    """
    number = torch_seed(seed, step, rank)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)


def torch_seed(seed: int, step: int, rank: int) -> int:
    """torch's seed for dropout inside the model, the only draw that depends on the rank count."""
    return int(np.random.SeedSequence([seed, step, *([rank] if rank else [])]).generate_state(1)[0])
