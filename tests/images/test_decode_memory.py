"""How much memory decoded images take at once, measured in a process of its own."""

import sys

import numpy as np
import pytest
from PIL import Image

from fastirt.images.decoders.interface import DECODED_BYTES
from tests.helpers import needs_dali, run_python

MEASURE = """
import sys, numpy as np, torch
from fastirt.datasets import Split
from fastirt.config.options import Config
from fastirt.loading.eval_loader import EvalLoader

small, large, loader, threads, count = *sys.argv[1:4], *map(int, sys.argv[4:])
settings = Config().replace(input_size=224, resize="square", resize_size=256, loader=loader, num_workers=threads)

def read(path, count):
    split = Split("test", [path] * count, np.zeros(count, np.int64))
    loader = EvalLoader(split, batch_size=count, input=settings.input, device=torch.device("cpu"))
    assert sum(batch.valid for batch in loader) == count

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

read(small, 16)  # what the libraries take once
open("/proc/self/clear_refs", "w").write("5")
before = peak()
read(large, count)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve megapixels, 36 MB each when decoded."""
    folder = tmp_path_factory.mktemp("large")
    y, x = np.mgrid[:3000, :4000]
    image = Image.fromarray(np.stack([x // 16, y // 12, (x + y) // 32], 2).astype(np.uint8))
    image.save(folder / "large.jpg")
    image.save(folder / "large.tif")
    image.resize((64, 64)).save(folder / "small.jpg")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's own peak")
@pytest.mark.parametrize(
    "name, loader",
    [
        pytest.param("large.jpg", "dali", marks=needs_dali),
        pytest.param("large.tif", "dali", marks=needs_dali),
        ("large.jpg", "torchvision"),
        ("large.jpg", "pil"),
        ("large.tif", "pil"),
    ],
)
def test_a_batch_of_large_images_stays_under_the_limit(name, loader, images):
    """24 of them are 0.9 GB at once; Pillow reads TIFF in the reading threads."""
    arguments = [images / "small.jpg", images / name, loader, 8, 24]
    done = run_python(MEASURE, *arguments, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 36e6 < int(done.stdout) <= DECODED_BYTES
