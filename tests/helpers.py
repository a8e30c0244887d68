"""A tiny model, image folders, runs of the command line, and steps by hand, for all tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from fastirt.cli import main
from fastirt.config.options import Config, InputConfig
from fastirt.datasets import Catalog
from fastirt.loading.batch import Batch, ImageViews
from fastirt.loading.train_loader import TrainLoader, train_loader
from fastirt.model.build import build_encoder
from fastirt.step.train_step import TrainStep, build_train_step

try:
    import nvidia.dali  # noqa: F401

    DECODER = "dali"
except ImportError:  # a machine that only runs the GPU's tests may lack it
    DECODER = "pil"
needs_dali = pytest.mark.skipif(DECODER != "dali", reason="needs NVIDIA DALI")
# Decoders whose pixels are compared with those of Pillow's.
FAST_LOADERS = [pytest.param("dali", marks=needs_dali), "torchvision"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

TINY_MODEL = "vit_tiny_patch16_224"
TINY_TIMM = dict(patch_size=8, embed_dim=48, depth=2, num_heads=3)  # as timm takes them


def tiny_kwargs(**changes) -> tuple[str, ...]:
    """The tiny model's --model-kwargs."""
    return tuple(f"{name}={value}" for name, value in {**TINY_TIMM, **changes}.items())


TINY_KWARGS = tiny_kwargs()
TINY = (
    f"--model {TINY_MODEL} --model-kwargs {' '.join(TINY_KWARGS)} --weights scratch --input-size 16 --resize-size 18 "
    f"--device cpu --num-workers 2 --loader {DECODER}"
).split()
SHORT = "--max-iter 4 --batch-size 8 --logging-freq 1 --rank 1 2".split()


def write_images(folder: Path, classes: int, views: int, size: int = 24, seed: int = 0) -> None:
    """Class folders of JPEG images: each class a colour, each view noise on top."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        color = rng.integers(40, 216, 3)
        (folder / f"class{label:02d}").mkdir(parents=True)
        for view in range(views):
            pixels = np.clip(color + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label:02d}" / f"{view}.jpg", quality=92)


def write_splits(root: Path, train: tuple[int, int], test: tuple[int, int]) -> Path:
    """A `folder` data set of unseen test classes: (classes, views) of each split."""
    write_images(root / "train", *train)
    write_images(root / "test", *test, seed=1)
    return root


def folder_flags(data: Path | str) -> list[str]:
    return ["--dataset", "folder", "--data-path", str(data)]


def run_cli(*words: object) -> int:
    """The exit code of `fastirt WORDS`, run in this process."""
    return main([str(word) for word in words])


def train_tiny(data: Path | str, out: Path | str, *flags: object) -> int:
    return run_cli("train", *folder_flags(data), "--output-dir", out, *TINY, *flags)


def train_few(data: Path, out: Path, *flags: object) -> int:
    """Six steps, with rows of the log at steps 2, 4 and 6 and checkpoints at 3 and 6."""
    few = "--max-iter 6 --batch-size 16 --m 2 --lr 1e-3 --logging-freq 2 --save-freq 3 --rank 1 2 4"
    return train_tiny(data, out, *few.split(), *flags)


def train_short(data: Path | str, out: Path | str, *flags: object) -> int:
    """Four steps of IRT_L with the recipe of the paper."""
    return train_tiny(data, out, "--method", "irt-l", *SHORT, *flags)


def read_config(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["config"]


def read_metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def loss_rows(run: Path) -> list[dict]:
    """The rows of the log that are of training, not of evaluation."""
    return [row for row in read_log(run) if "loss" in row]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr since the previous call: the error of a command that was refused."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def assert_same_weights(found: Path, expected: Path) -> None:
    """Bit for bit, of two runs or two files of tensors."""
    a, b = (load_file(path / "model.safetensors" if path.is_dir() else path) for path in (found, expected))
    assert a.keys() == b.keys()
    differing = [name for name in a if not same_bits(a[name], b[name])]
    assert not differing, differing


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (value.reshape(-1).contiguous().view(torch.uint8) for value in (a, b))
    return torch.equal(a, b)


def run_python(code: str, *arguments: object, timeout: float = 100) -> subprocess.CompletedProcess:
    """Python code in a process of its own, in the root of the repository."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def timm_model(file: Path | None = None, **changes) -> torch.nn.Module:
    """The tiny model as plain timm makes and loads it, in another depth or with a head by
    `changes`."""
    kwargs = {**dict(num_classes=0, img_size=16, **TINY_TIMM), **changes}
    return timm.create_model(TINY_MODEL, **kwargs, checkpoint_path=str(file or ""))


def tiny_input(**changes) -> InputConfig:
    return InputConfig(**{**dict(input_size=16, resize_size=18, num_workers=2), **changes})


def tiny_loader(
    catalog: Catalog, device: torch.device = CPU, store=None, start_step=0, bad=(), csv_path=None, **flat
) -> TrainLoader:
    """The training loader of a run with these options; without a cache unless `cache` says so."""
    small = dict(m=0, seed=0, input_size=16, resize_size=18, num_workers=2, cache="none")
    config = Config().replace(**{**small, **flat})
    return train_loader(catalog, config, device, store=store, start_step=start_step, bad=bad, csv_path=csv_path)


def tiny_config(**flat) -> Config:
    base = dict(
        model=TINY_MODEL,
        model_kwargs=TINY_KWARGS,
        weights="scratch",
        input_size=16,
        precision="fp32",
        batch_size=8,
        lr=1e-3,
        max_iter=10,
    )
    return Config().replace(**{**base, **flat})


def make_step(config: Config, train_size: int = 20, device: str | torch.device = "cpu") -> TrainStep:
    torch.manual_seed(0)
    encoder = build_encoder(config.model, config.input.input_size)
    return build_train_step(encoder, config, train_size, torch.device(device))


def make_batch(step: int, size: int = 8, device: str | torch.device = "cpu", rows: slice = slice(None)) -> Batch:
    """Random images of three classes, the same for the same step; `rows`: of a batch of `size`."""
    rng = np.random.default_rng(step)
    images = torch.from_numpy(rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8))[rows].to(device)
    labels = torch.from_numpy(rng.integers(0, 3, size))[rows].to(device)
    return Batch(ImageViews.whole(images), labels, np.arange(size)[rows], step, len(images))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_steps(step: TrainStep, first: int, last: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """The logged values of each step, (steps, values)."""
    curve = []
    for number in range(first, last):
        before = step.counters.sums.clone()
        step(make_batch(number, device=device))
        curve.append(step.counters.sums - before)
    return torch.stack(curve)
