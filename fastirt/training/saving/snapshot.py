"""Copies of a state on the host: the step may change its tensors while the copies are written."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor


class Snapshot:
    """Copies a state's tensors: on a CPU clones them, from a GPU copies them into page-locked
    memory without waiting for the device.

    The page-locked memory stays allocated for the next copies: the bytes of all tensors, each
    rounded up to a power of two by torch's allocator.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}
        self._device: Optional[torch.device] = None  # of the tensors, where that is a GPU
        self._arrived: Optional[torch.cuda.Event] = None

    def take(self, state: Any) -> Any:
        """A copy of `state`, a tree of dicts, lists, tuples, tensors and other values.

        Copies from a GPU are queued on the current stream, behind the step, and are complete after
        `wait`. They hold until the next `take`.
        """
        copied = self._copy(state, "")
        if self._device is not None:
            # without `blocking` the thread that waits for it keeps a core busy
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(self._device))
        return copied

    @property
    def in_flight(self) -> bool:
        """Whether `wait` has something to wait for."""
        return self._arrived is not None

    def wait(self) -> None:
        """Wait until the device has made the copies; from any thread."""
        if self._arrived is not None:
            # a new thread is on the first GPU: its call could make a context there
            with torch.cuda.device(self._device):
                self._arrived.synchronize()
            self._arrived = None

    def _copy(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), path)
        if isinstance(value, dict):
            return {key: self._copy(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, f"{path}.{i}") for i, item in enumerate(value))
        return value

    def _copy_tensor(self, tensor: Tensor, path: str) -> Tensor:
        if not tensor.is_cuda:
            return tensor.clone(memory_format=torch.contiguous_format)
        self._device = tensor.device
        held = self._pinned.get(path)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._pinned[path] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # a copy between different strides would go through memory that is not page-locked
        return held.copy_(tensor.contiguous(), non_blocking=True)
