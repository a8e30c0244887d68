"""A small data set of images of several sizes and modes, to pack."""

from pathlib import Path

import pytest

from tests.images.image_files import smooth

SIZES = [(40, 61), (75, 50), (33, 33), (90, 31), (48, 48), (120, 37), (50, 50), (31, 90)]


@pytest.fixture()
def data(tmp_path) -> Path:
    """12 images of 3 classes in a train, a query and a gallery split."""
    root = tmp_path / "data"
    lines = ["path,label,split"]
    for i in range(12):
        split = "train" if i < 6 else "query" if i < 8 else "gallery"
        name = f"{split}/é {i}.{'png' if i == 1 else 'jpg'}"
        (root / split).mkdir(parents=True, exist_ok=True)
        image = smooth(i, SIZES[i % len(SIZES)])
        if i in (2, 3):
            image = image.convert("L" if i == 2 else "CMYK")
        image.save(root / name, **({} if i == 1 else {"quality": 95}))
        lines.append(f"{name},{'abc'[i % 2 + (i > 5)]},{split}")
    (root / "split.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
