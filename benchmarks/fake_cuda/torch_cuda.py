"""Puts fake streams, and the answers of CUDA's driver, into torch.cuda, torch._C and dynamo."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Callable

import torch

from benchmarks.fake_cuda import fake_tensors, streams
from benchmarks.fake_cuda.streams import Device, Event, Graph, Stream, current_stream


def _host_register(pointer: int, size: int, flags: int) -> int:
    fake_tensors.lock(pointer)
    return 0


def replace(properties: SimpleNamespace) -> None:
    """Put all of this into torch.cuda, torch._C and dynamo's table of devices."""
    # dynamo makes tables of torch's functions when they are imported: they must be the true ones
    import torch._dynamo.device_interface as interface
    import torch._dynamo.trace_rules as rules

    rules.get_torch_obj_rule_map()
    functions = _functions(properties)
    for name, value in functions.items():
        setattr(torch.cuda, name, value)
    # What C++ would answer from the driver. The last two are called where a capture fails.
    bindings: Any = torch._C
    bindings._cuda_getCurrentRawStream = lambda index: current_stream().number
    bindings._cuda_getDeviceCount = lambda: 1
    bindings._cuda_endAllocateToPool = lambda *_: None
    bindings._cuda_releasePool = lambda *_: None
    _replace_interface(interface, functions, properties)


def _nothing() -> Callable[..., None]:
    """A new function each time: dynamo's tables refuse one function under two names."""
    return lambda *_, **__: None


def _functions(properties: SimpleNamespace) -> dict[str, Any]:
    state = torch.zeros(16, dtype=torch.uint8)
    return dict(
        # autocast("cuda") switches itself off without is_available, and FakeTensorMode would
        # allocate a real tensor to initialize CUDA
        is_available=lambda: True,
        is_initialized=lambda: True,
        init=_nothing(),
        _lazy_init=_nothing(),
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=_nothing(),
        device=Device,
        _exchange_device=lambda *_: 0,
        _maybe_exchange_device=lambda *_: 0,
        get_device_properties=lambda *_: properties,
        get_device_capability=lambda *_: (properties.major, properties.minor),
        get_device_name=lambda *_: properties.name,
        is_bf16_supported=lambda *_, **__: True,
        mem_get_info=lambda *_: (properties.total_memory, properties.total_memory),
        memory_allocated=lambda *_: 0,
        empty_cache=_nothing(),
        synchronize=lambda *_, **__: streams.wait_on_host("device"),
        current_stream=current_stream,
        default_stream=streams.default_stream,
        set_stream=streams.set_stream,
        stream=streams.stream_context,
        Stream=Stream,
        Event=Event,
        CUDAGraph=Graph,
        graph=streams.graph_context,
        graph_pool_handle=lambda: (0, 1),
        is_current_stream_capturing=streams.is_capturing,
        manual_seed=_nothing(),
        manual_seed_all=_nothing(),
        default_generators=(torch.Generator(),),
        get_rng_state=lambda *_: state,
        set_rng_state=_nothing(),
        cudart=lambda: SimpleNamespace(cudaHostRegister=_host_register, cudaHostUnregister=fake_tensors.unlock),
    )


def _replace_interface(interface: Any, functions: dict[str, Any], properties: SimpleNamespace) -> None:
    """Dynamo and inductor ask for devices through this class, which holds the true functions."""
    found = interface.CudaInterface
    for name in ("current_device", "set_device", "device_count", "stream", "current_stream", "set_stream"):
        setattr(found, name, staticmethod(functions[name]))
    for name in ("synchronize", "get_device_properties", "is_bf16_supported"):
        setattr(found, name, staticmethod(functions[name]))
    found.get_raw_stream = staticmethod(lambda index: current_stream().number)
    found.exchange_device = found.maybe_exchange_device = staticmethod(lambda *_: 0)
    found.Event, found.Stream, found.device = Event, Stream, Device
    interface.caching_worker_device_properties["cuda"] = [properties]
    interface.caching_worker_current_devices["cuda"] = 0
