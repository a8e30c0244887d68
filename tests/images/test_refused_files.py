"""Files that are no images or would take too much memory are refused by name."""

import os
import resource
import struct

import numpy as np
import pytest
from PIL import Image

from fastirt.images.formats.header_check import BadImage, inspect
from fastirt.images.formats.pillow import FORMATS
from fastirt.images.source import FileSource
from tests.images.every_kind import animated
from tests.images.image_files import (
    SIDE,
    encode,
    photo,
    png_chunk,
)


def test_a_pipe_and_a_device_neither_block_nor_fill_the_memory(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (str(tmp_path / "pipe.jpg"), "/dev/zero"):
        with pytest.raises(BadImage, match="not a regular file"):
            FileSource([path]).read(0)


def test_formats_that_start_other_programs_are_never_opened(tmp_path):
    assert not {"EPS", "WMF", "PDF", "GRIB", "HDF5", "BUFR"} & set(FORMATS)
    with pytest.raises(BadImage, match="PostScript"):
        inspect(encode(photo(), "EPS"))


@pytest.mark.parametrize(
    "data, name",
    [
        (b"<?xml version='1.0'?>\n<!-- drawing -->\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        ("\ufeff<svg/>".encode("utf-16"), "SVG"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "video"),
        (b"\x1aE\xdf\xa3" + bytes(40), "video"),
        (b"RIFF\x40\0\0\0AVI LIST" + bytes(50), "video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "CR3"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(100), "CR2"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(80), "RAF"),
        (b"IIU\0\x18\0\0\0" + bytes(80), "RW2"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(30), "ZIP"),
        (b"\x93NUMPY\1\0", "NumPy"),
        ("plain words, accents: \u00e9\u00e8\n".encode(), "text"),
        (b"<!DOCTYPE html>\n<html>", "HTML"),
        (bytes(300), "zero bytes"),
        (b"", "empty"),
        (bytes(128) + b"DICM" + bytes(20), "DICOM"),
        (np.random.default_rng(8).integers(128, 256, 400, dtype=np.uint8).tobytes(), "not an image"),
    ],
)
def test_what_is_no_image_is_named(data, name):
    with pytest.raises(BadImage, match=name) as error:
        inspect(data, "x.jpg")
    assert "\n" not in error.value.reason


def test_a_camera_s_raw_file_is_not_read_as_its_preview():
    for options in ({"tiffinfo": {254: 1}}, {"tiffinfo": {50706: b"\1\4\0\0"}}):
        with pytest.raises(BadImage, match="camera RAW"):
            inspect(encode(photo(), "TIFF", **options))


def test_heic_is_read_or_named():
    if "HEIF" in FORMATS:
        data = encode(photo(48, 64), "HEIF")
        assert inspect(data) == (48, 64)
    else:
        with pytest.raises(BadImage, match="pillow-heif"):
            inspect(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))


def bombs() -> dict[str, bytes]:
    """Small files whose headers ask for enormous images."""
    huge = struct.pack("<HH", 60_000, 60_000)
    gif, tiff, jp2 = encode(photo(), "GIF"), encode(photo(), "TIFF"), encode(photo(), "JPEG2000")
    frame = gif.index(b"\x2c", 13 + 3 * 2 ** (gif[10] % 8 + 1))
    canvas = (2**14 - 1).to_bytes(3, "little") * 2
    webp = animated("WEBP")
    icon = encode(photo(), "ICO", sizes=[(SIDE, SIDE)])
    inner = icon.index(b"IHDR") - 4
    large = png_chunk(b"IHDR", struct.pack(">II", 30_000, 30_000) + icon[inner + 16 : inner + 21])
    siz = jp2.index(b"\xff\x4f\xff\x51") + 8
    # ImageWidth and its type
    tag = struct.pack("<HH", 256, tiff[tiff.index(struct.pack("<H", 256), 8) + 2])
    width = tiff.index(tag, 8)
    return {
        "GIF": gif[:6] + huge + gif[10:],
        "GIF frame": gif[: frame + 5] + huge + gif[frame + 9 :],
        "WebP canvas": webp[:24] + canvas + webp[30:],
        "PPM": b"P6 60000 60000 255\n" + bytes(100),
        "PPM digits": b"P6 " + b"9" * 5000 + b" 9 255\n",
        "icon": icon[:inner] + large + icon[inner + 25 :],
        "JPEG 2000 codestream": jp2[:siz] + struct.pack(">II", 60_000, 60_000) + jp2[siz + 8 :],
        "BMP": encode(photo(), "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encode(photo(), "BMP")[26:],
        "TIFF": tiff[:width] + struct.pack("<HHII", 256, 4, 1, 2**30) + tiff[width + 12 :],
        "just above the limit": encode(Image.new("1", (8193, 8192)), "TIFF", compression="group4"),
    }


@pytest.mark.parametrize("name", bombs())
def test_enormous_images_are_refused_before_memory_is_taken(name):
    data = bombs()[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage):
        inspect(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
