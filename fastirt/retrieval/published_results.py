"""Results published by the paper and by its best-known public re-implementation."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Recall@K in percent at the data set's four K, or at the first only."""

    source: str
    method: str
    model: str
    recalls: tuple[float, ...]


PAPER, PUBLIC = "El-Nouby et al. 2021", "jhgan00/image-retrieval-transformers"
DECIMALS = {PAPER: 1, PUBLIC: 2}  # as printed
SMALL, DISTILLED = "DeiT-S", "DeiT-S distilled"
TIMM_NAMES = {"deit_small_patch16_224": SMALL, "deit_small_distilled_patch16_224": DISTILLED}
PUBLISHED_RANKS = {"sop": (1, 10, 100, 1000), "cub200": (1, 2, 4, 8), "inshop": (1, 10, 20, 30)}


PUBLISHED: dict[str, list[Published]] = {
    "sop": [
        Published(PAPER, "irt-o", SMALL, (52.8,)),
        Published(PAPER, "irt-l", SMALL, (83.0,)),
        Published(PAPER, "irt-r", SMALL, (84.0, 93.6, 97.2, 99.1)),
        Published(PAPER, "irt-r", DISTILLED, (84.2, 93.7, 97.3, 99.1)),
        Published(PUBLIC, "irt-o", SMALL, (53.12, 68.96, 81.60, 94.09)),
        Published(PUBLIC, "irt-l", SMALL, (83.56, 93.29, 97.23, 99.03)),
        Published(PUBLIC, "irt-r", SMALL, (82.67, 92.73, 96.69, 98.80)),
        Published(PUBLIC, "irt-r", DISTILLED, (82.70, 92.85, 96.92, 98.86)),
    ],
    "cub200": [
        Published(PAPER, "irt-o", SMALL, (58.5,)),
        Published(PAPER, "irt-l", SMALL, (74.2,)),
        Published(PAPER, "irt-r", SMALL, (74.7, 82.9, 89.3, 93.3)),
        Published(PAPER, "irt-r", DISTILLED, (76.6, 85.0, 91.1, 94.3)),
        Published(PUBLIC, "irt-o", SMALL, (58.68, 71.30, 80.96, 88.18)),
        Published(PUBLIC, "irt-l", SMALL, (73.68, 82.58, 88.77, 92.71)),
        Published(PUBLIC, "irt-r", SMALL, (73.73, 82.91, 89.30, 93.35)),
        Published(PUBLIC, "irt-r", DISTILLED, (76.55, 85.26, 90.92, 94.65)),
    ],
    "inshop": [
        Published(PAPER, "irt-o", SMALL, (31.3,)),
        Published(PAPER, "irt-l", SMALL, (90.3,)),
        Published(PAPER, "irt-r", SMALL, (91.5, 98.1, 98.7, 99.0)),
        Published(PAPER, "irt-r", DISTILLED, (91.9, 98.1, 98.7, 98.9)),
        Published(PUBLIC, "irt-o", SMALL, (31.28, 57.03, 64.20, 68.28)),
        Published(PUBLIC, "irt-l", SMALL, (93.09, 98.28, 98.74, 99.02)),
        Published(PUBLIC, "irt-r", SMALL, (90.47, 97.97, 98.61, 98.92)),
        Published(PUBLIC, "irt-r", DISTILLED, (90.66, 98.16, 98.68, 98.99)),
    ],
}
