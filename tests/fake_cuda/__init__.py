"""A CUDA device that exists in shape only: for tests of the GPU path on a machine without a GPU.

    from tests.fake_cuda import install
    install(device="H200")                        # before fastirt is imported; never undone
    with FakeTensorMode():
        torch.ones(3, device="cuda", requires_grad=True).sum().backward()

Tensors have shapes, dtypes, strides and devices but no values. Operators run as far as their fake
implementations go; streams, events and CUDA graphs only write down what they are told (`events`);
launches of Triton kernels are recorded, not run. So it shows what the host does: whether it waits
for the device, what crosses between host and device, dtypes, layouts, and the order of streams. It
shows no value and no time.

`install` changes torch, triton and one C++ object of this process. Use a process of its own, and
leave it by `os._exit`: destructors at the end of the interpreter may meet the replaced parts and
crash.

| module | what it replaces |
| --- | --- |
| `devices` | properties of an H200 and an A100 |
| `driver` | `install`; CUDA's hooks in C++, and triton's driver |
| `streams` | torch.cuda: streams, events, graphs, device functions |
| `fake_tensors` | what FakeTensorMode lacks: copies, pinned memory, convolution, attention |
| `watch` | nothing: it checks each operator, custom operators and launches |

`python -m tests.fake_cuda.run MODULE` runs `step_proof`, `planted`, `input_proof`, `readout_proof`,
`save_proof`, `collectives_proof` or `compile_proof`; the tests do the same. Neither values,
nor kernels' own code, nor what NCCL, DALI and CUDA's allocator do is shown. DistributedDataParallel
is replaced by a stand-in, since its C++ part asks the driver for events.
"""

from tests.fake_cuda.driver import install
from tests.fake_cuda.streams import events

__all__ = ["events", "install"]
