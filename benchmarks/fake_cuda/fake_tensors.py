"""What fake CUDA tensors need beyond FakeTensorMode, and where they would lie about a GPU."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

Module = TypeVar("Module", bound=torch.nn.Module)
# Attributes of these are replaced, which a type checker forbids.
_mode: Any = fake_tensor.FakeTensorMode
_fake: Any = fake_tensor.FakeTensor
_tensor: Any = Tensor
_module: Any = torch.nn.Module
_bindings: Any = torch._C

# Page-locked host memory: address, and the tensor that keeps it from being reused, or None.
_locked: dict[int, Tensor | None] = {}
_used: dict[int, list[int]] = {}  # by address: streams of which `record_stream` told the allocator


def replace(attention: str) -> None:
    # The mode initializes CUDA before it makes a tensor there, which needs a driver.
    _mode.avoid_device_init = property(lambda self: True)
    # copy.deepcopy of a fake model (momentum encoder, bf16 copy) would copy its mode too, and
    # tensors of two modes cannot meet.
    _mode.__deepcopy__ = lambda self, memo: self
    # The address of each fake tensor is 0, so that a new cache would look like the one before. This
    # one is unique to the storage and aligned as CUDA's are.
    _fake.data_ptr = lambda self: address(self)
    _tensor.pin_memory = _pin_memory
    _tensor.record_stream = lambda self, stream: _used.setdefault(address(self), []).append(stream.number)
    for name in ("_fused_adamw_", "_fused_adam_", "_fused_sgd_"):  # no meta kernel with the rate in a tensor
        torch.library.impl(f"aten::{name}.tensor_lr", "Meta")(lambda *_, **__: None)
    _replace_module_apply()
    _replace_convolution()
    _replace_attention(attention)


def address(tensor: Tensor) -> int:
    """A number for the tensor's first byte."""
    return (tensor.untyped_storage()._cdata << 9) + tensor.storage_offset() * tensor.element_size()


def lock(pointer: int, tensor: Tensor | None = None) -> None:
    """Mark the host memory at an address as page-locked, as cudaHostRegister does."""
    _locked[pointer] = tensor


def unlock(pointer: int) -> None:
    _locked.pop(pointer, None)


def recorded_streams(tensor: Tensor) -> list[int]:
    return _used.get(address(tensor), [])


def is_locked(tensor: Tensor) -> bool:
    """Whether a host tensor's memory is page-locked: only then a copy does not wait."""
    return tensor.untyped_storage()._cdata << 9 in _locked


def _pin_memory(self: Tensor, *_: Any) -> Tensor:
    copied = torch.empty_like(self)
    copied.copy_(self)
    lock(address(copied), copied)
    return copied


def fake_module(module: Module) -> Module:
    """Replace each weight of a real module by a fake one; within a FakeTensorMode.

    timm asks for values while it builds a model, so models are built for real on the CPU.
    `mode.from_tensor` would do, but for its weak references, which forbid Module.to.
    """
    for child in module.modules():
        tensors: tuple[Any, Any] = (child._parameters, child._buffers)
        for held in tensors:
            for name, value in held.items():
                if value is not None:
                    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                    held[name] = torch.nn.Parameter(made, value.requires_grad) if held is child._parameters else made
    return module


def _replace_module_apply() -> None:
    """Module.to swaps the insides of fake parameters, which their weak references forbid: new
    parameters take their place."""
    original = _module._apply

    def apply(self: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
        if not any(isinstance(weight, fake_tensor.FakeTensor) for weight in self.parameters()):
            return original(self, function, recurse)
        for module in self.modules() if recurse else [self]:
            for name, weight in module._parameters.items():
                if weight is not None:
                    with torch.no_grad():
                        module._parameters[name] = torch.nn.Parameter(function(weight), weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = function(buffer)
        return self

    _module._apply = apply


def _replace_convolution() -> None:
    """Without a device no cuDNN is found, and convolutions get the layouts of a CPU.

    No eager step differs in what is checked here, but code that inductor generates would copy the
    channels-last images first.
    """
    select = _bindings._select_conv_backend

    def select_conv_backend(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if input.device.type == "cuda" and weight.ndim == 4 and kwargs.get("groups", 1) == 1:
            return _bindings._ConvBackend.Cudnn
        return select(input, weight, *args, **kwargs)

    _bindings._select_conv_backend = select_conv_backend


def _replace_attention(name: str) -> None:
    """Without a device no fused kernel is found: attention would be plain products, with a softmax
    and a product in float32."""
    functional: Any = torch.nn.functional
    plain, aten = functional.scaled_dot_product_attention, torch.ops.aten

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.device.type != "cuda" or name == "math" or attn_mask is not None:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        saves = query.requires_grad
        given = (query, key, value)
        if query.dtype == torch.float32 or name == "efficient":
            kernel = aten._scaled_dot_product_efficient_attention.default
            return kernel(*given, None, saves, dropout_p, is_causal, scale=scale)[0]
        if name == "cudnn":
            kernel = aten._scaled_dot_product_cudnn_attention.default
            return kernel(*given, None, saves, dropout_p, is_causal, False, scale=scale)[0]
        return aten._scaled_dot_product_flash_attention.default(*given, dropout_p, is_causal, False, scale=scale)[0]

    functional.scaled_dot_product_attention = attention


def tensors_of(*values: Any) -> list[Tensor]:
    """All tensors in nested lists and dicts."""
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
