"""Which decoder `--loader` means on a device."""

from __future__ import annotations

import logging

import torch

from fastirt.config.options import InputConfig
from fastirt.errors import UserError
from fastirt.images.decoders.dali import DaliDecoder, check_dali
from fastirt.images.decoders.interface import Decoder
from fastirt.images.decoders.pil import PilDecoder
from fastirt.images.decoders.torchvision import TorchvisionDecoder, check_torchvision
from fastirt.images.formats.structure import complaint

log = logging.getLogger("fastirt")

CHECKS = {"dali": check_dali, "torchvision": check_torchvision}  # each raises where it cannot work
FASTEST_FIRST = {"cuda": ("dali", "torchvision", "pil"), "cpu": ("torchvision", "dali", "pil")}
NAMES = {"dali": "NVIDIA DALI", "torchvision": "torchvision", "pil": "Pillow"}
HINTS = {"dali": "pip install nvidia-dali-cuda130", "torchvision": "pip install torchvision"}


def choose_loader(name: str, device: torch.device) -> str:
    """`name`, or for "auto" the fastest decoder that works here.

    A log line names faster ones that do not work. Raises UserError if the named one does not.
    """
    if name != "auto":
        if problem := _problem(name):
            raise UserError(f"--loader {name}: {problem}: {HINTS[name]}, or use --loader auto in a new run")
        return name
    for name in FASTEST_FIRST[device.type]:
        problem = _problem(name)
        if not problem:
            break
        log.info("--loader auto: not %s: %s", NAMES[name], problem)
    return name


def make_decoder(name: str, input: InputConfig, batch_size: int, threads: int, device: torch.device) -> Decoder:
    """The decoder `name`, for batches of at most `batch_size` images as `input` says."""
    size, orientation = input.input_size, input.orientation
    if name == "dali":
        return DaliDecoder(size, batch_size, threads, device, orientation=orientation)
    return {"pil": PilDecoder, "torchvision": TorchvisionDecoder}[name](size, threads, orientation)


def _problem(name: str) -> str:
    """Why a decoder does not work here, in one line; empty if it does."""
    try:
        CHECKS.get(name, lambda: None)()
    except Exception as error:
        return complaint(error, "used")
    return ""
