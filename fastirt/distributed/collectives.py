"""Tensors on their way between ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class PendingGather:
    """A gather under way."""

    def __init__(self, whole: Tensor, work: Any) -> None:
        self._whole, self._work = whole, work

    def wait(self) -> Tensor:
        """The gathered tensor; on a GPU its stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._whole
