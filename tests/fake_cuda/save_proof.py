"""A checkpoint of a run on a fake GPU: copies that do not wait, and the thread that waits for them.

`python -m tests.fake_cuda.run save_proof [CASE ...]`
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.fake_cuda import events
from benchmarks.fake_cuda.fake_tensors import address, is_locked, tensors_of
from benchmarks.fake_cuda.streams import host_waits
from fastirt.distributed.ranks import SINGLE_PROCESS
from fastirt.training import checkpoint
from fastirt.training.training_state import TrainingState
from tests.fake_cuda.cases import print_faults
from tests.fake_cuda.step_proof import batch_of, fake_step
from tests.fake_cuda.watch import Watch

SAVES = 2  # the second one reuses the memory of the first


def save(**planted: Any) -> list[str]:
    """Steps go on while a checkpoint is on its way; two of them, the second in the same memory.

    planted: replacements of torch.empty's arguments.
    """
    faults: list[str] = []
    waiting: list[str] = []
    written: list[Any] = []
    order: list[str] = []
    go = threading.Event()

    def host_value(self: torch.Tensor) -> int:
        if self.is_cuda or threading.current_thread() is not threading.main_thread() or not go.is_set():
            faults.append("a value is read before the device has passed the copies")
        return -1

    def wait_on_device() -> None:
        if not go.wait(30):
            faults.append("the loop waits for the thread")
        waiting.append(threading.current_thread().name)
        of_snapshot()
        order.append("copied")

    def write(path: Path, state: Any, keep: int) -> None:
        order.append("written")
        written.append(state)

    empty = torch.empty
    with (
        FakeTensorMode(),
        Watch() as watch,
        mock.patch.object(FakeTensor, "__int__", host_value),
        mock.patch.object(checkpoint, "save", write),
        mock.patch.object(torch, "empty", lambda *sizes, **options: empty(*sizes, **{**options, **planted})),
    ):
        step = fake_step(engine="eager", precision="bf16", encoder_momentum=0.9)
        state = TrainingState(step, step.config, "digest", SINGLE_PROCESS)
        of_snapshot, state.snapshot.wait = state.snapshot.wait, wait_on_device
        batches = [batch_of(number) for number in range(SAVES + 1)]
        step(batches[0])
        for number in range(SAVES):
            watch.faults.clear(), watch.uploads.clear(), events.clear(), go.clear()
            path = Path(f"step_{number}.safetensors")
            state.save(path, [], before_write=lambda bad: order.append("log row"))
            copies = [copy for copy in watch.uploads if "training/saving/snapshot.py" in copy]
            recorded = [event for event in events if event[0] == "record"]
            step(batches[number + 1])
            faults += watch.faults + host_waits()
            go.set()
            state.writer.join()
            if len(recorded) != 1 or recorded[0][2] != 0:
                faults.append(f"events on the step's stream after the copies: {recorded}")
            if len(host_waits()) != 1 or state.last_checkpoint != path:
                faults.append(f"waits of the thread: {host_waits()}, last: {state.last_checkpoint}")
            on_device = [t for t in tensors_of(step.state_dict(), step.optimizer.state_dict()) if t.is_cuda]
            # one of them is also read for its own sake: the first non-finite step
            if len(copies) != len(on_device) + 1:
                faults.append(f"{len(copies)} copies of {len(on_device)} tensors on the device")
    if order != ["copied", "log row", "written"] * SAVES:  # the row is not repeated after a resumption
        faults.append(f"the order is {order}")
    if waiting != ["fastirt-checkpoint"] * SAVES:
        faults.append(f"waits for the copies: {waiting}")
    first, second = (tensors_of(tree) for tree in written)
    if [address(tensor) for tensor in first] != [address(tensor) for tensor in second]:
        faults.append("the second save took other memory")
    if not all(tensor.device.type == "cpu" and is_locked(tensor) and tensor.is_contiguous() for tensor in second):
        faults.append("the thread got what is not page-locked, contiguous memory")
    return list(dict.fromkeys(faults))


CASES: dict[str, Callable[[], list[str]]] = {
    "save": save,
    "planted: memory that is not page-locked": lambda: save(pin_memory=False),
}


def main(names: list[str]) -> None:
    print_faults(CASES, names)
