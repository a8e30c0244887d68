"""A CUDA device that exists in shape only, to follow the GPU path on a machine without a GPU.

    from benchmarks.fake_cuda import install
    install(device="H200")                        # before fastirt is imported; never undone
    with FakeTensorMode():
        torch.ones(3, device="cuda", requires_grad=True).sum().backward()

Tensors have shapes, dtypes, strides and devices but no values. Operators run as far as their fake
implementations go; streams, events and CUDA graphs only write down what they are told (`events`);
no kernel is launched. So it shows what the host does, and what torch.compile generates. It shows no
value and no time. Used by `benchmarks.predict.record` and by the tests in `tests/fake_cuda`.

`install` changes torch, triton and one C++ object of this process; no file of torch is changed. Use
a process of its own, and leave it by `os._exit`: destructors at the end of the interpreter may meet
the replaced parts and crash. Written for torch 2.11 and 2.12.

| module | what it replaces |
| --- | --- |
| `devices` | properties of an H200 and an A100 |
| `driver` | `install`; CUDA's hooks in C++, and triton's driver |
| `streams` | torch.cuda's streams, events and graphs |
| `torch_cuda` | torch.cuda's functions, and what torch._C and dynamo answer from the driver |
| `fake_tensors` | what FakeTensorMode lacks: copies, pinned memory, convolution, attention |
"""

from benchmarks.fake_cuda.driver import install
from benchmarks.fake_cuda.streams import events

__all__ = ["events", "install"]
