"""A small data set like CUB-200 as an archive, and its download."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
import tarfile
from pathlib import Path

from fastirt.datasets.archives.download import download
from fastirt.datasets.archives.published import Archive, Published
from fastirt.datasets.archives.transfer import Patience
from fastirt.datasets.cub_sop_inshop import load_cub200

HASTE = Patience(timeout=0.4, retries=3, pause=0.01, longest_pause=0.02)
NAMES = [f"{c:03d}.Bird{c}/B_{i}.jpg" for c in range(1, 5) for i in range(2)]


def tgz(files: dict[str, bytes | str]) -> bytes:
    """A .tgz; a text is the target of a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def facts(data: bytes, name: str = "CUB_200_2011.tgz", **changes) -> Published:
    archive = Archive(
        name,
        (),
        len(data),
        hashlib.sha256(data).hexdigest(),
        "",
        name.split(".")[0],
        sum(len(d) for d in FILES.values()),
    )
    archive = dataclasses.replace(archive, **changes)
    return Published("cub200", {"train": 4, "test": 4}, {"train": 2, "test": 2}, archive)


# Noise, which gzip does not shrink: the archive is larger than a buffer of the network.
FILES: dict[str, bytes] = {
    **{f"CUB_200_2011/images/{name}": random.Random(name).randbytes(20_000) for name in NAMES},
    "CUB_200_2011/images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(NAMES, 1)).encode(),
    "attributes.txt": b"beside",
    "CUB_200_2011/._images.txt": b"macOS",
}
DATA = tgz(FILES)


def fetch(folder: Path, *urls: str, **changes) -> Path:
    return download(facts(DATA, **changes), load_cub200, folder, urls=urls, patience=HASTE, progress=False)
