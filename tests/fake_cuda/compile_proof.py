"""Compiles recorded launches: `python -m tests.fake_cuda.run compile_proof KERNEL ...`."""

from __future__ import annotations

import json

from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fake_cuda.step_proof import LAUNCHES, batch_of, fake_step
from tests.fake_cuda.watch import Watch


def main(kernels: list[str]) -> None:
    """Print the name and target of each kernel, compiled as the second step launches it."""
    with FakeTensorMode():
        step = fake_step(engine="eager", precision="bf16")
        for number in range(2):
            LAUNCHES.clear()
            with Watch():  # without it custom operators only say what they return
                step(batch_of(number))
    for launch in LAUNCHES:
        if launch.name in kernels:
            ptx = launch.compiled().asm["ptx"]
            target = next(line for line in ptx.splitlines() if line.startswith(".target"))
            print(json.dumps([launch.name, target]), flush=True)
