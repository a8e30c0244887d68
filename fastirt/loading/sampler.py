"""Which images make batch `step`: a pure function of (seed, step, set of bad images).

A bad image is replaced by the next good one of an order that does not depend on the bad images. So
a batch depends on which images are bad, and never on when that was found out: a resumed run and an
uninterrupted one draw the same batches.
"""

from __future__ import annotations

import logging
from typing import Collection

import numpy as np

from fastirt.config.random_streams import Purpose, stream
from fastirt.config.validate import check_number
from fastirt.errors import UserError


class Sampler:
    """Rows of batch `step`. The last two batches are remembered: a loader asks for each twice."""

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int) -> None:
        self.labels, self.batch_size, self.seed = np.asarray(labels, np.int64), batch_size, seed
        self._members = class_members(self.labels)
        self._drawn: dict[tuple[int, frozenset[int]], np.ndarray] = {}

    def batch(self, step: int, bad: Collection[int] = frozenset()) -> np.ndarray:
        """(B,) int64 rows, none of them in `bad`. Raises UserError if too few images are left."""
        key = step, frozenset(bad)
        if key not in self._drawn:
            rows = self._draw(step, key[1])
            while len(self._drawn) > 1:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[key] = rows
        return self._drawn[key].copy()

    def _draw(self, step: int, bad: frozenset[int]) -> np.ndarray:
        raise NotImplementedError


class ShuffledStream(Sampler):
    """Shuffled epochs as one endless stream, cut into full batches: none is short.

    labels: (N,) int64. Position p of the stream is element p mod N of epoch p // N's permutation.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int) -> None:
        super().__init__(labels, batch_size, seed)
        self._epochs: dict[int, np.ndarray] = {}

    def _draw(self, step: int, bad: frozenset[int]) -> np.ndarray:
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.labels))
        rows = np.empty(self.batch_size, np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            rows[epochs == epoch] = self._permutation(epoch)[offsets[epochs == epoch]]
        if bad:
            for position in np.flatnonzero(np.isin(rows, list(bad))):
                rows[position] = self._replacement(step, int(position), int(rows[position]), bad)
        return rows

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch can straddle two epochs
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = stream(self.seed, Purpose.SHUFFLE, epoch).permutation(len(self.labels))
        return self._epochs[epoch]

    def _replacement(self, step: int, position: int, row: int, bad: Collection[int]) -> int:
        """Another image of its class; if none is left, any other image."""
        random = stream(self.seed, Purpose.REPLACE, step, position)
        for candidates in (self._members[self.labels[row]], np.arange(len(self.labels))):
            for candidate in random.permutation(candidates):
                if int(candidate) not in bad:
                    return int(candidate)
        raise UserError("no training image can be read: see bad_pictures.csv")


class ClassBalanced(Sampler):
    """batch_size / m distinct classes a batch, m images of each.

    Images of a class are distinct; those of a class with fewer than m readable ones repeat in turn.
    pytorch-metric-learning's MPerClassSampler draws the same way.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, m: int, seed: int) -> None:
        super().__init__(labels, batch_size, seed)
        self.m = m
        self._classes = np.array(sorted(self._members), np.int64)

    def _draw(self, step: int, bad: frozenset[int]) -> np.ndarray:
        """Class by class."""
        needed = self.batch_size // self.m
        classes = stream(self.seed, Purpose.CLASSES, step).permutation(self._classes)
        # One generator a step: one for each class takes longer than a training step.
        members = stream(self.seed, Purpose.MEMBERS, step)
        groups: list[np.ndarray] = []
        for first in range(0, len(classes), needed):  # further classes only if some have no image left
            labels = classes[first : first + needed].tolist()
            ends = np.cumsum([len(self._members[label]) for label in labels])
            for label, keys in zip(labels, np.split(members.random(ends[-1]), ends[:-1])):
                group = self._group(label, keys, bad)
                if len(group):
                    groups.append(group)
                if len(groups) == needed:
                    return np.concatenate(groups)
        raise UserError(
            f"only {len(groups)} classes have a readable image, "
            f"a batch of {self.batch_size} with m = {self.m} needs {needed}: see bad_pictures.csv"
        )

    def _group(self, label: int, keys: np.ndarray, bad: Collection[int]) -> np.ndarray:
        """m rows of a class: the first m by their keys, bad ones replaced by the next good ones.

        Empty if all are bad.
        """
        members = self._members[label]
        order = members[keys.argsort()].tolist()
        group, spare = order[: self.m], iter(row for row in order[self.m :] if row not in bad)
        group = [row if row not in bad else next(spare, None) for row in group]
        good = [row for row in group if row is not None]
        return np.resize(np.array(good, np.int64), self.m if good else 0)


def make_sampler(labels: np.ndarray, batch_size: int, m: int, seed: int) -> Sampler:
    """m = 0: shuffled epochs, else m images per class. Raises UserError for impossible batches."""
    labels = np.asarray(labels, np.int64)
    check_number("batch_size", batch_size)
    if len(labels) == 0:
        raise UserError("the training split is empty: there is nothing to draw batches from")
    if m == 0:
        return ShuffledStream(labels, batch_size, seed)
    if m < 0 or batch_size % m:
        raise UserError(f"--batch-size {batch_size} is not a multiple of --m {m}")
    sizes = np.unique(labels, return_counts=True)[1]
    if len(sizes) < batch_size // m:
        raise UserError(
            f"--batch-size {batch_size} with --m {m} needs {batch_size // m} classes, "
            f"the training split has {len(sizes)}: lower --batch-size or raise --m"
        )
    if (sizes < m).any():
        logging.getLogger("fastirt").warning(
            "%d of %d classes have fewer than m = %d images: theirs repeat within a batch",
            (sizes < m).sum(),
            len(sizes),
            m,
        )
    return ClassBalanced(labels, batch_size, m, seed)


def class_members(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Rows of each label, in order."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts[1:])))
