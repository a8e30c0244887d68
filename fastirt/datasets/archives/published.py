"""What is published about the data sets: archives with sizes and digests, and counts by split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional

from fastirt.datasets.cub_sop_inshop import COUNTS


@dataclass(frozen=True)
class Archive:
    """One file that holds a whole data set.

    Attributes:
        name: of the file; .zip, .tgz or .tar.gz.
        urls: where it is, tried in this order.
        size: in bytes.
        sha256, md5: hex digests.
        folder: the folder in the archive that is the data set.
        unpacked: about how many bytes its files take; four times as many are refused.
    """

    name: str
    urls: tuple[str, ...]
    size: int
    sha256: str
    md5: str
    folder: str
    unpacked: int


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        dataset: its name for `--dataset`.
        images, classes: by split.
        archive: None where a person must sign for the files.
        spot_md5: md5 of some of its files, by their path in the data set's folder.
    """

    dataset: str
    images: Mapping[str, int]
    classes: Mapping[str, int]
    archive: Optional[Archive] = None
    spot_md5: tuple[tuple[str, str], ...] = ()


# Sizes and sha256 are those of TensorFlow Datasets' checksums, class counts the papers'.
PUBLISHED = {
    "cub200": Published(
        "cub200",
        COUNTS["cub200"],
        {"train": 100, "test": 100},
        Archive(
            "CUB_200_2011.tgz",
            (
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "https://data.caltech.edu/records/20098/files/CUB_200_2011.tgz",
            ),
            1_150_585_339,
            "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
            "97eceeb196236b17998738112f37df78",
            "CUB_200_2011",
            1_400_000_000,
        ),
    ),
    "sop": Published(
        "sop",
        COUNTS["sop"],
        {"train": 11318, "test": 11316},
        Archive(
            "Stanford_Online_Products.zip",
            (
                "https://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
                "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
            ),
            3_083_860_082,
            "b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
            "7f73d41a2f44250d4779881525aea32e",
            "Stanford_Online_Products",
            3_200_000_000,
        ),
        (
            ("bicycle_final/111265328556_0.JPG", "77420a4db9dd9284378d7287a0729edb"),
            ("chair_final/111182689872_0.JPG", "ce78d10ed68560f4ea5fa1bec90206ba"),
            ("table_final/111194782300_0.JPG", "8203e079b5c134161bbfa7ee2a43a0a1"),
            ("toaster_final/111157129195_0.JPG", "d6c24ee8c05d986cafffa6af82ae224e"),
        ),
    ),
    "inshop": Published("inshop", COUNTS["inshop"], {"train": 3997, "query": 3985, "gallery": 3985}),
}

INSHOP_BY_HAND = """\
In-Shop must be fetched by a person, who signs its agreement. Then put it into {folder}:
  1. Follow "In-shop Clothes Retrieval Benchmark" on
     https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html to its files.
  2. Eval/list_eval_partition.txt  ->  {folder}/Eval/list_eval_partition.txt
  3. Img/img.zip (not img_highres.zip, which published results do not use), unpacked so that
     {folder}/img/WOMEN/... or {folder}/Img/img/WOMEN/... exists
  4. fastirt verify inshop {folder}
No digest of its files is published; `verify` prints those of your copy, to compare with others."""
