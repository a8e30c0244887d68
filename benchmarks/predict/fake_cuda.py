"""A CUDA device without memory or driver: fake tensors have its shapes, dtypes and strides.

`install()` makes torch believe in a GPU, so that torch.compile generates code for it on a machine
without one. Call it once a process, before fastirt is imported; it cannot be undone. No file of
torch is changed. Written for torch 2.11 and 2.12.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from pathlib import Path
from typing import Any, Callable

import torch

H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024, L2_cache_size=50 * 2**20, is_integrated=0, is_multi_gpu_board=0,
    clock_rate=1980000, memory_clock_rate=3201000, memory_bus_width=6144, pci_bus_id=0, pci_device_id=0,
    pci_domain_id=0, uuid="GPU-fake", gcnArchName="",
)  # fmt: skip
_keep: list[Any] = []  # what C++ holds pointers to


def install() -> None:
    """Raises RuntimeError where this torch has another layout, or a real GPU is present."""
    if _keep:
        return
    if torch._C._cuda_getDeviceCount() > 0:
        raise RuntimeError("this machine has a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    torch._C._ensureCUDADeviceGuardSet()  # a device guard that does nothing
    _deny_primary_context()
    torch.autograd.set_multithreading_enabled(False)  # there is no autograd thread of the device
    _replace_torch_cuda()
    _replace_fake_tensors()
    _replace_triton_driver()
    _replace_attention()


def _deny_primary_context() -> None:
    """Make CUDAHooks::hasPrimaryContext return false.

    Autograd asks it before any backward of CUDA tensors, and without a device it raises. Slots of
    the virtual table: two destructors, isBuilt, isAvailable, hasPrimaryContext.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    hooks = library._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    pointer = ctypes.c_void_p.from_address(hooks())
    address = pointer.value or 0
    predicate = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    slots = (ctypes.c_void_p * 4).from_address(address)
    is_built, is_available = (predicate(slots[number] or 0)(hooks()) for number in (2, 3))
    if not is_built or is_available:
        raise RuntimeError(f"at::CUDAHooksInterface has another layout in torch {torch.__version__}")
    table = (ctypes.c_void_p * 66)()
    ctypes.memmove(table, address - 16, ctypes.sizeof(table))
    never = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda this, index: False)
    table[2 + 4] = ctypes.cast(never, ctypes.c_void_p).value
    _keep.extend((table, never))
    pointer.value = ctypes.addressof(table) + 16


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _returns(value: Any) -> Callable[..., Any]:
    """A new function each time: dynamo keeps tables by function."""
    return lambda *_, **__: value


class Stream:
    """All streams are the default stream: nothing runs."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda:0")

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = wait = synchronize = _nothing


class _Device:
    """A context manager and, as dynamo demands, a class."""

    def __init__(self, index: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def _replace_torch_cuda() -> None:
    # Imported first: dynamo makes tables of torch's own functions, before they are replaced.
    import torch._dynamo.device_interface as interface
    import torch._dynamo.trace_rules as rules

    rules.get_torch_obj_rule_map()
    default = Stream()

    @contextlib.contextmanager
    def stream(of: Any):
        yield

    state = torch.zeros(16, dtype=torch.uint8)
    replaced: dict[str, Any] = dict(
        get_rng_state=lambda *_: state, get_device_properties=lambda *_: H200,
        get_device_capability=lambda *_: (H200.major, H200.minor), get_device_name=lambda *_: H200.name,
        current_stream=lambda *_: default, default_stream=lambda *_: default, stream=stream, Stream=Stream,
        Event=Event, device=_Device, default_generators=(types.SimpleNamespace(manual_seed=_nothing),),
        mem_get_info=lambda *_: (H200.total_memory, H200.total_memory),
    )  # fmt: skip
    replaced |= {name: _returns(True) for name in ("is_available", "is_initialized", "is_bf16_supported")}
    zeros = ("current_device", "memory_allocated", "_exchange_device", "_maybe_exchange_device")
    replaced |= {name: _returns(0) for name in zeros}
    nothings = (
        "init", "_lazy_init", "set_device", "synchronize", "empty_cache", "set_stream", "manual_seed",
        "manual_seed_all", "set_rng_state",
    )  # fmt: skip
    replaced |= {name: _returns(None) for name in nothings}
    replaced |= {"device_count": _returns(1), "is_current_stream_capturing": _returns(False)}
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    bindings: Any = torch._C
    bindings._cuda_getCurrentRawStream = _returns(0)
    bindings._cuda_getDeviceCount = lambda: 1
    cuda: Any = interface.CudaInterface
    shared = (
        "current_device", "set_device", "device_count", "stream", "current_stream", "set_stream", "synchronize",
        "get_device_properties", "is_bf16_supported",
    )  # fmt: skip
    for name in shared:
        setattr(cuda, name, staticmethod(replaced[name]))
    for name in ("get_raw_stream", "exchange_device", "maybe_exchange_device"):
        setattr(cuda, name, staticmethod(_returns(0)))
    cuda.Event, cuda.Stream, cuda.device = Event, Stream, _Device
    interface.caching_worker_device_properties["cuda"] = [H200]
    interface.caching_worker_current_devices["cuda"] = 0


def _replace_fake_tensors() -> None:
    import torch._subclasses.fake_tensor

    fake: Any = torch._subclasses.fake_tensor
    mode: Any = fake.FakeTensorMode
    fake.init_gpu_context = _nothing
    mode.avoid_device_init = property(lambda self: True)
    mode.__deepcopy__ = lambda self, memo: self  # copying a fake model would copy its mode
    bindings: Any = torch._C
    select = bindings._select_conv_backend

    def select_conv_backend(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Without a device torch finds no cuDNN and chooses other layouts."""
        if input.device.type == "cuda" and weight.ndim == 4 and kwargs.get("groups", 1) == 1:
            return bindings._ConvBackend.Cudnn
        return select(input, weight, *args, **kwargs)

    bindings._select_conv_backend = select_conv_backend
    tensor: Any = torch.Tensor
    tensor.pin_memory = lambda self, *_: self
    # With the rate in a tensor these have no meta kernel.
    for name in ("_fused_adamw_", "_fused_adam_", "_fused_sgd_"):
        torch.library.impl(f"aten::{name}.tensor_lr", "Meta")(_nothing)
    module: Any = torch.nn.Module
    original = module._apply

    def apply(self: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
        """Module.to swaps the insides of parameters, which fake ones forbid: replace them."""
        if not any(isinstance(p, fake.FakeTensor) for p in self.parameters()):
            return original(self, fn, recurse)
        for module in self.modules() if recurse else [self]:
            for name, p in module._parameters.items():
                if p is not None:
                    with torch.no_grad():
                        module._parameters[name] = torch.nn.Parameter(fn(p), p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = fn(b)
        return self

    module._apply = apply


def _replace_triton_driver() -> None:
    """Triton sees the device's target and limits. Nothing can be launched."""
    import triton
    from triton.backends.compiler import GPUTarget

    limits = {
        "max_shared_mem": H200.shared_memory_per_block_optin, "multiprocessor_count": H200.multi_processor_count,
        "sm_clock_rate": H200.clock_rate, "mem_clock_rate": H200.memory_clock_rate,
        "mem_bus_width": H200.memory_bus_width, "warpSize": 32, "max_num_regs": 65536,
    }  # fmt: skip
    driver: Any = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", H200.major * 10 + H200.minor, 32), get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0, utils=types.SimpleNamespace(get_device_properties=lambda *_: limits),
        get_device_interface=lambda: torch.cuda, get_active_torch_device=lambda: torch.device("cuda:0"),
        binary_ext="cubin", is_active=lambda: True, map_python_to_cpp_type=lambda ty: ty,
        set_current_device=_nothing, launcher_cls=None,
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    active: Any = triton.runtime.driver
    active._default = driver


def _replace_attention() -> None:
    """Without a device torch finds no fused attention and multiplies plainly: take flash, or in
    float32 the memory-efficient one, as on a GPU."""
    plain, aten = torch.nn.functional.scaled_dot_product_attention, torch.ops.aten

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.device.type != "cuda" or attn_mask is not None:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.dtype == torch.float32:
            return aten._scaled_dot_product_efficient_attention.default(
                query, key, value, None, query.requires_grad, dropout_p, is_causal, scale=scale
            )[0]
        flash = aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]

    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = attention
