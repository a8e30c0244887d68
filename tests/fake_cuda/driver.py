"""`install`, and the replaced parts of CUDA's driver: the hooks in C++ and triton's driver."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from tests.fake_cuda import fake_tensors, streams
from tests.fake_cuda.devices import DEVICES

_keep: list[Any] = []  # C++ points to these


def install(device: str = "H200", attention: str = "flash") -> None:
    """Make this process see one GPU, `device`. Call it before fastirt is imported.

    device: a key of DEVICES.
    attention: what scaled_dot_product_attention becomes for 16-bit inputs without a mask: "flash",
        "cudnn", "efficient" or "math". float32 always takes "efficient".

    Raises RuntimeError beside a real GPU, where fastirt is imported already, where
    TRITON_INTERPRET is set, and with a torch whose C++ objects have another layout.
    """
    if _keep:
        return
    if torch._C._cuda_getDeviceCount() > 0:
        raise RuntimeError("there is a real GPU here: the fake one would hide it")
    if "fastirt" in sys.modules:
        raise RuntimeError("fastirt is imported already: it may have asked for the device")
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("TRITON_INTERPRET is set: launches would run on the CPU instead of being recorded")
    properties = DEVICES[device]
    # A device guard that does nothing. The true one asks CUDA's runtime for the device, which says
    # that the driver is insufficient.
    torch._C._ensureCUDADeviceGuardSet()
    _deny_primary_context()
    # Else autograd runs the backward in a thread of the device, where the lines of the step that
    # led there are not on the stack: faults would not name them.
    torch.autograd.set_multithreading_enabled(False)
    streams.replace(properties)
    fake_tensors.replace(attention)
    _replace_triton_driver(properties)


def _deny_primary_context() -> None:
    """Make CUDAHooks::hasPrimaryContext answer no.

    Autograd asks it before each backward of CUDA tensors, and the true one fails where there is no
    device ("hasPrimaryContext expects a valid device index"). It is virtual, so its slot is
    replaced in a copy of the object's table. The slots: two destructors, isBuilt, isAvailable,
    hasPrimaryContext.
    """
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    hooks = library._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(hooks())
    predicate = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    slots = (ctypes.c_void_p * 4).from_address(table.value)
    is_built, is_available = (predicate(slots[i])(hooks()) for i in (2, 3))
    if not is_built or is_available:
        raise RuntimeError("at::CUDAHooksInterface has another layout in this torch, or it is built without CUDA")
    copied = (ctypes.c_void_p * 66)()
    # 16 bytes before the table: its offset and type information
    ctypes.memmove(copied, table.value - 16, ctypes.sizeof(copied))
    never = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda this, index: False)
    copied[2 + 4] = ctypes.cast(never, ctypes.c_void_p).value
    _keep.extend((copied, never))
    table.value = ctypes.addressof(copied) + 16


def _replace_triton_driver(properties: SimpleNamespace) -> None:
    """Let triton compile for the device.

    Launches can be recorded without it, but triton and inductor compile nothing where no driver is
    active.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", properties.major * 10 + properties.minor, 32)
    limits = {
        "max_shared_mem": properties.shared_memory_per_block_optin,
        "multiprocessor_count": properties.multi_processor_count,
        "sm_clock_rate": properties.clock_rate,
        "mem_clock_rate": properties.memory_clock_rate,
        "mem_bus_width": properties.memory_bus_width,
        "warpSize": 32,
        "max_num_regs": properties.regs_per_multiprocessor,
    }
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: torch.cuda.current_stream().number,
        set_current_device=lambda *_: None,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda:0"),
        utils=SimpleNamespace(get_device_properties=lambda *_: limits),
        map_python_to_cpp_type=lambda name: name,
        binary_ext="cubin",
        is_active=lambda: True,
        launcher_cls=None,
    )
    triton.runtime.driver.set_active(driver)
    triton.runtime.driver._default = driver
