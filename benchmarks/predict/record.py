"""python -m benchmarks.predict.record "+ CUDA graph" --out benchmarks/predict/kernels

Writes the list of kernels of one row of `benchmarks step`, without a GPU: the step runs on fake
CUDA tensors, and TorchInductor generates the code that it would run on an H200. The code is read,
never run. 20 to 40 seconds on one core that is otherwise idle.
"""

from __future__ import annotations

import os
import tempfile

# Before any import of torch or triton.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if __name__ == "__main__":  # Inductor leaves folders behind where it is stopped
    SCRATCH = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = SCRATCH.name

from benchmarks import fake_cuda

if __name__ == "__main__":
    fake_cuda.install()

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_cuda.fake_tensors import fake_module
from benchmarks.parts.step import contenders
from benchmarks.predict import kernel_list
from benchmarks.predict.inductor import Graph, recorded_code
from benchmarks.predict.operators import EagerOperators, own_kernels, recorded_gather
from fastirt.config.options import Config
from fastirt.loading.batch import Batch, ImageViews
from fastirt.model.build import build_encoder
from fastirt.step.train_step import build_train_step

DEVICE = torch.device("cuda:0")


def record(row: str, sizes: dict[str, Any], **inductor: Any) -> tuple[list[Graph], list[dict[str, Any]]]:
    """The graphs of torch.compile in one step, and all its kernels, those of the graphs first.

    row: of `benchmarks step`.
    sizes: model, input_size, batch_size and slots.
    inductor: further options of Inductor.

    Raises ValueError for an unknown row or one without compiler.
    """
    changes = dict(contenders(DEVICE).get(row) or {})
    if changes.get("engine", "eager") == "eager":
        raise ValueError(f"{row!r}: not a compiled row of `python -m benchmarks step`")
    transform, options = changes.pop("transform", None), {**changes.pop("inductor", {}), **inductor}
    config = Config().replace(
        weights="scratch", max_iter=10**6, batch_size=sizes["batch_size"], model=sizes["model"], memory_ratio=1.0,
        **changes,
    )  # fmt: skip
    # Real parameters first: timm asks for values while it builds a model.
    encoder = build_encoder(config.model, sizes["input_size"])
    if transform is not None:
        transform(encoder)
    with FakeTensorMode(), recorded_code() as graphs, recorded_gather() as gathered:
        step = build_train_step(fake_module(encoder), config, sizes["slots"], DEVICE, compile_options=options)
        if "max_grad_norm" in step.optimizer.defaults:  # as the part `step` has it
            step.optimizer.defaults["max_grad_norm"] = None
        engine: Any = step.engine
        engine.run = lambda body: body()  # what a CUDA graph holds, not its capture
        step(_batch(sizes, 0))  # compiles
        gathered.calls.clear()
        with EagerOperators() as eager:
            step(_batch(sizes, 1))
        others = eager.kernels + own_kernels(step, sizes["batch_size"], gathered)
    return graphs, [kernel for graph in graphs for kernel in graph.kernels()] + others


def _batch(sizes: dict[str, Any], number: int) -> Batch:
    count, side = sizes["batch_size"], sizes["input_size"]
    images = torch.empty(count, side, side, 3, dtype=torch.uint8, device=DEVICE)
    labels = torch.empty(count, dtype=torch.int64, device=DEVICE)
    return Batch(ImageViews.whole(images), labels, np.arange(count), number, count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict.record", description=__doc__)
    parser.add_argument("row", help="a compiled row of `python -m benchmarks step`, e.g. '+ CUDA graph'")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--slots", type=int, default=59551, help="of the memory")
    parser.add_argument("--out", type=Path, default=kernel_list.FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("model", "input_size", "batch_size", "slots")}
    _, kernels = record(args.row, sizes)
    path = kernel_list.write(args.out, args.row, sizes, kernels, torch.__version__)
    print(f"wrote {path}", flush=True)
    sys.stderr.flush()
    SCRATCH.cleanup()
    os._exit(0)  # an orderly exit ends in a segmentation fault: C++ hooks were replaced


if __name__ == "__main__":
    main()
