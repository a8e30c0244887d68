"""Faults put into the step, one at a time: `python -m tests.fake_cuda.run planted [FAULT ...]`.

Each must be reported with the line below that plants it. The step without any is in `step_proof`.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastirt.kernels.passes import launch
from fastirt.objective.cross_batch_memory import CrossBatchMemory
from fastirt.step import train_step
from fastirt.step.cuda_graph import Capture
from fastirt.step.step_input import StepInput
from tests.fake_cuda import step_proof

_enqueue, _clip, _build_images = CrossBatchMemory.enqueue, train_step.clip_gradients, StepInput.build_images
_copy_batch, _backward = StepInput.copy_batch, launch.backward


def _item(self, embeddings, labels):
    self.pointer.item()
    return _enqueue(self, embeddings, labels)


def _boolean_mask(self, embeddings, labels):
    labels[labels >= 0]
    return _enqueue(self, embeddings, labels)


def _index_on_host(self, embeddings, labels):
    self.labels[torch.zeros(3, dtype=torch.int64)]
    return _enqueue(self, embeddings, labels)


def _mixed_devices(self, embeddings, labels):
    labels + torch.zeros(len(labels), dtype=torch.int64)
    return _enqueue(self, embeddings, labels)


def _if_tensor(weights, largest):
    norm = _clip(weights, largest)
    if norm > 1e9:
        raise AssertionError
    return norm


def _copied_to_host(weights, largest):
    return _clip(weights, largest).cpu().cuda()


def _new_tensor(weights, largest):
    return _clip(weights, largest) * torch.tensor([1.0], device=weights[0].device)[0]


def _fp32_images(self):
    return _build_images(self).float()


def _synchronize(self):
    torch.cuda.synchronize()
    return _build_images(self)


def _new_buffers(self, batch, first):
    moved = _copy_batch(self, batch, first)
    self._allocate(batch.views)
    return moved


def _other_strides(rows: Tensor, *args: Any, **options: Any) -> Tensor:
    return rows.new_empty(rows.shape[1], rows.shape[0]).t()


def _labels_on_host(rows, labels, *args, **options):
    return _backward(rows, labels.new_empty(labels.shape, device="cpu"), *args, **options)


def _plant(owner: Any, name: str, fault: Any) -> contextlib.AbstractContextManager:
    return mock.patch.object(owner, name, fault)


_EAGER = dict(engine="eager", precision="bf16-weights", clip_grad=1.0, encoder_momentum=0.9, drop_path=0.1)
_GRAPH = {**_EAGER, "engine": "graph"}

# name: (setting, planted fault)
FAULTS = {
    ".item()": (_EAGER, _plant(CrossBatchMemory, "enqueue", _item)),
    "boolean mask": (_EAGER, _plant(CrossBatchMemory, "enqueue", _boolean_mask)),
    "if tensor": (_EAGER, _plant(train_step, "clip_gradients", _if_tensor)),
    ".cpu()": (_EAGER, _plant(train_step, "clip_gradients", _copied_to_host)),
    "index on the host": (_EAGER, _plant(CrossBatchMemory, "enqueue", _index_on_host)),
    "operands on two devices": (_EAGER, _plant(CrossBatchMemory, "enqueue", _mixed_devices)),
    "fp32 images into bf16 weights": (_EAGER, _plant(StepInput, "build_images", _fp32_images)),
    "synchronize": (_EAGER, _plant(StepInput, "build_images", _synchronize)),
    "register_fake of other strides": (_EAGER, _plant(launch, "backward", _other_strides)),
    "launch with a host tensor": (_EAGER, _plant(launch, "backward", _labels_on_host)),
    "tensor made from a number": (_EAGER, _plant(train_step, "clip_gradients", _new_tensor)),
    "masks from pageable memory": (_EAGER, _plant(Tensor, "pin_memory", lambda self: self)),
    "synchronize in a capture": (_GRAPH, _plant(StepInput, "build_images", _synchronize)),
    "new buffers each step": (_GRAPH, _plant(StepInput, "copy_batch", _new_buffers)),
    "capture without a warm-up": (_GRAPH, _plant(Capture, "_warm_up", lambda self, body: None)),
}


def main(names: list[str]) -> None:
    """Print one JSON line for each fault: its name and what was reported."""
    for name in names or FAULTS:
        setting, planted = FAULTS[name]
        with planted:
            print(json.dumps([name, step_proof.prove(setting)]), flush=True)
