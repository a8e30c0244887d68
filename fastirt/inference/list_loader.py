"""Batches of an `ImageList` in evaluation's way, with any part of them left out."""

from __future__ import annotations

import contextlib
import sys
from typing import Callable, Iterator, Sequence

import numpy as np
import torch

from fastirt.config.options import InputConfig
from fastirt.config.validate import check_number
from fastirt.datasets.records import Split
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.images.bad_images import BadRows
from fastirt.images.formats.header_check import BadImage, inspect
from fastirt.images.source import ImageSource
from fastirt.loading.batch import Batch
from fastirt.loading.eval_loader import EvalLoader
from fastirt.loading.image_reader import DecodedImages

OnBad = Callable[[int, str, str], None]  # row, name, reason


class ListLoader(EvalLoader):
    """`EvalLoader` of images without classes. Unreadable ones are reported, however many.

    Args:
        source: N encoded images.
        batch_size: the most images in a batch; all batches have one size, the last is padded.
        input: resize, crop, decoder and threads.
        device: where batches go.
        on_bad: called with row, name and reason of each unreadable image.
        ranks: their number decides the threads of each.

    Attributes:
        todo: numbers of the batches to make, ascending; at first all.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        input: InputConfig,
        device: torch.device,
        on_bad: OnBad,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        check_number("batch_size", batch_size)
        split = _Sized("images", (), np.zeros(len(source), np.int64))
        super().__init__(split, batch_size=batch_size, input=input, device=device, store=source, ranks=ranks)
        assert isinstance(self.images, DecodedImages)
        self.images.bad = BadReports(source, on_bad)
        self.todo: Sequence[int] = range(len(self))

    def rows(self, batch: int) -> range:
        """The rows of a batch, bad ones too."""
        return range(batch * self._size, min((batch + 1) * self._size, len(self._labels)))

    def batch_of(self, row: int) -> int:
        """The number of the batch that holds a row."""
        return row // self._size

    def batches(self) -> Iterator[Batch]:
        readable = self._readable
        for step, following in zip(self.todo, [*self.todo[1:], None]):
            views = None
            after = np.empty(0, np.int64) if following is None else readable(following)
            while views is None and len(rows := readable(step)):
                views = self.images.views(rows, None, step, after)
            if views is not None:
                yield self._padded(views.images, rows, step)

    def _readable(self, batch: int) -> np.ndarray:
        return np.array([row for row in self.rows(batch) if row not in self.images.bad.rows], np.int64)


class _Sized(Split):
    """A split of which only the number of images is known."""

    def __len__(self) -> int:
        return len(self.labels)


class BadReports(BadRows):
    """Bad rows that are passed on to a function, without limit."""

    def __init__(self, source: ImageSource, on_bad: OnBad) -> None:
        super().__init__(source, None, max_bad=sys.maxsize)
        self._on_bad = on_bad
        self.rows: set[int] = set()  # grows in place: copies of it would make many bad rows slow

    def add(self, row: int, reason: str, step: int) -> None:
        if row not in self.rows:
            self.rows.add(row)
            self._on_bad(row, self.source.path(row), " ".join(reason.split()))


class MeasuredSource:
    """A source that notes (width, height) of each image that is read, as its header says."""

    def __init__(self, source: ImageSource, sizes: np.ndarray) -> None:
        self._source, self._sizes = source, sizes
        self.path = source.path

    def __len__(self) -> int:
        return len(self._source)

    def read(self, row: int) -> np.ndarray:
        data = self._source.read(row)
        with contextlib.suppress(BadImage):  # reported by whoever decodes it
            structure = inspect(data)
            self._sizes[row] = structure.width, structure.height
        return data
