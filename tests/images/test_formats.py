"""Whatever Pillow opens is read, to Pillow's pixels, by every decoder and by `pack`."""

import numpy as np
import pytest
from PIL import Image

from fastirt.images.formats.header_check import inspect
from tests.helpers import FAST_LOADERS, run_python
from tests.images.every_kind import every_kind
from tests.images.image_files import (
    by_pillow,
    packed,
    read,
    write,
)

NAMES = list(every_kind())


@pytest.fixture(scope="module", params=FAST_LOADERS)
def readings(tmp_path_factory, request):
    """One file of each kind, and what each reader makes of it."""
    fast = request.param
    folder = tmp_path_factory.mktemp("kinds")
    split = write(folder / "images", list(every_kind().values()))
    return {
        "fast": read(split, loader=fast),
        "pil": read(split, loader="pil"),
        "fast, upright": read(split, orientation="exif", loader=fast),
        "packed": read(split, packed(split, folder / "store"), loader=fast),
        "resized": read(split, resize_size=40, input_size=40, loader=fast),
        "resized by pil": read(split, resize_size=40, input_size=40, loader="pil"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_gives_pillow_s_pixels(readings, name):
    row, data = NAMES.index(name), every_kind()[name]
    expected = by_pillow(data)
    for reader in ("fast", "pil", "fast, upright"):
        assert np.array_equal(readings[reader][row], expected), reader
    assert np.abs(readings["packed"][row].astype(int) - expected).mean() < (4 if "1-bit" in name else 1.5)
    resized = readings["resized by pil"][row].astype(int)
    assert np.array_equal(resized, np.asarray(Image.fromarray(expected).resize((40, 40), 3)))
    difference = np.abs(readings["resized"][row] - resized)
    # black and white dots: DALI rounds once, Pillow twice
    assert difference.mean() < (2.5 if "1-bit" in name else 0.3)
    if not inspect(data).plain:  # resized by Pillow already
        assert difference.max() == 0


QUIET = """
import sys
from pathlib import Path
from tests.images.every_kind import *
from tests.images.image_files import *
files = list(every_kind().values())
files += [encode(Image.new("1", (12000, 9000)), "TIFF", compression="group4"), encode(photo(), "TIFF")[:-50]]
files += [encode(photo(), kind)[:300] for kind in ("TIFF", "GIF", "AVIF", "JPEG2000", "PPM")]
split = write(Path(sys.argv[1]), files)
print(len(read(split, loader="pil", orientation="exif")), len(files))
"""


@pytest.mark.slow
def test_pillow_prints_nothing(tmp_path):
    done = run_python(QUIET, tmp_path)
    assert done.returncode == 0, done.stderr
    read_rows, written = map(int, done.stdout.split())
    assert 0 < read_rows < written
    lines = [line for line in done.stderr.splitlines() if "bad image" not in line]
    assert not lines


MUTATED = """
import sys, time
from pathlib import Path
from tests.images.every_kind import *
from tests.images.image_files import *
rng = np.random.default_rng(int(sys.argv[2]))
originals = list(every_kind().values())
def mutated(data):
    data, kind = bytearray(data), rng.integers(5)
    at, length = (int(v) for v in rng.integers(0, len(data), 2))
    if kind == 0:
        for place in rng.integers(0, min(len(data), 2 ** int(rng.integers(5, 16))), int(rng.integers(1, 5))):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at + length // 8] = bytes(length // 8)
    elif kind == 3:
        data[at:at] = data[length:length + 64]
    else:
        place = int(rng.integers(0, min(len(data), 128)))
        data[place:place + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
    return bytes(data)
slowest = 0
rounds, count = int(sys.argv[3]), 0
for number in range(rounds):
    files = [mutated(data) for data in originals]
    split = write(Path(sys.argv[1]), files)
    resize, orientation = "shorter" if number % 2 else "square", "exif" if number % 4 < 2 else "stored"
    options = dict(resize=resize, orientation=orientation, max_bad=10**6)
    start = time.monotonic()
    ours, plain = read(split, loader=sys.argv[4], **options), read(split, loader="pil", **options)
    slowest = max(slowest, time.monotonic() - start)
    count += len(plain)
    if ours.keys() != plain.keys():
        by_one = [(row, sys.argv[4] if row in ours else "pil") for row in ours.keys() ^ plain.keys()]
        print("read by one only:", by_one, file=sys.stderr)
    for row in ours.keys() & plain.keys():
        assert np.abs(ours[row].astype(int) - plain[row]).mean() < 2, (number, row, options)
print(count, rounds * len(originals), round(slowest, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("loader", FAST_LOADERS)
def test_mutated_files_of_every_kind_crash_nothing(tmp_path, loader):
    """In a process of its own; readers that both read a file agree on it."""
    done = run_python(MUTATED, tmp_path, 0, 4, loader)
    assert done.returncode == 0, done.stderr[-2000:]
    readable, files, _ = done.stdout.split()
    assert 0 < int(readable) < int(files)
