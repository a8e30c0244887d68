"""Orientation, upright or as stored: the decoders, the cache and `pack` agree with Pillow."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastirt.datasets import Catalog
from fastirt.errors import UserError
from fastirt.images.formats.header_check import inspect
from fastirt.images.formats.jpeg import with_orientation
from fastirt.images.source import FileSource
from fastirt.loading.cache_budget import image_shapes
from tests.helpers import FAST_LOADERS
from tests.images.image_files import (
    by_pillow,
    config,
    encode,
    jpeg_with,
    packed,
    photo,
    png_chunk,
    png_with,
    read,
    read_cached,
    write,
)

EIGHT = range(1, 9)


def exif(orientation: int, endian: str = "<", kind: int = 3, count: int = 1) -> bytes:
    """A TIFF block with one entry: the orientation."""
    value = struct.pack(endian + ("H2x" if kind == 3 else "I"), orientation)
    entry = struct.pack(endian + "HHI", 0x0112, kind, count) + value
    head = (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(endian + "IH", 8, 1)
    return head + entry + bytes(4)


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def app1(tiff: bytes) -> tuple[int, bytes]:
    return 0xE1, b"Exif\0\0" + tiff


def xap(orientation: int) -> tuple[int, bytes]:
    return 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation)


def files_of(orientation: int, height: int = 20, width: int = 31) -> dict[str, bytes]:
    """One image with this orientation, in every way to say so."""
    image = photo(height, width, seed=orientation)
    jpeg, png = encode(image, "JPEG", subsampling=2), encode(image, "PNG")
    itxt = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation))
    hexed = (b"Exif\0\0" + exif(orientation)).hex().encode()
    raw = png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(hexed) // 2, hexed))
    return {
        "JPEG": jpeg_with(jpeg, app1(exif(orientation))),
        "JPEG, big-endian": jpeg_with(jpeg, app1(exif(orientation, ">"))),
        "JPEG, a LONG": jpeg_with(jpeg, app1(exif(orientation, "<", kind=4))),
        "JPEG, XMP": jpeg_with(jpeg, xap(orientation)),
        "JPEG, EXIF and other XMP": jpeg_with(jpeg, xap(3), app1(exif(orientation))),
        "progressive JPEG": jpeg_with(encode(image, "JPEG", progressive=True), app1(exif(orientation))),
        "CMYK JPEG": jpeg_with(encode(image.convert("CMYK"), "JPEG"), app1(exif(orientation))),
        "PNG": png_with(png, png_chunk(b"eXIf", exif(orientation, ">"))),
        "PNG, behind the pixels": png_with(png, png_chunk(b"eXIf", exif(orientation)), behind_pixels=True),
        "PNG, XMP": png_with(png, itxt),
        "PNG, XMP behind the pixels": png_with(png, itxt, behind_pixels=True),
        "PNG, raw profile": png_with(png, raw),
        "16-bit PNG": png_with(
            encode(Image.fromarray(np.arange(height * width, dtype=np.uint16).reshape(height, width) * 90), "PNG"),
            png_chunk(b"eXIf", exif(orientation)),
        ),
        "WebP": encode(image, "WEBP", exif=b"Exif\0\0" + exif(orientation)),
        "WebP, XMP": encode(image, "WEBP", xmp=xmp(orientation)),
        "TIFF": encode(image, "TIFF", tiffinfo={274: orientation}),
        "LZW TIFF": encode(image, "TIFF", compression="tiff_lzw", tiffinfo={274: orientation}),
        "AVIF": encode(image, "AVIF", exif=b"Exif\0\0" + exif(orientation)),
    }


NAMES = list(files_of(1))


def upright(data: bytes, orientation: str) -> np.ndarray:
    """What Pillow makes of a file; 16 bits scaled."""
    with Image.open(io.BytesIO(data)) as image:
        turned = ImageOps.exif_transpose(image) if orientation == "exif" else image
        if turned.mode == "I;16":
            return np.repeat(np.rint(np.asarray(turned) / 257).astype(np.uint8)[..., None], 3, 2)
        return np.asarray(turned.convert("RGB"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A split of every file with every orientation, and its (name, value) by row."""
    folder = tmp_path_factory.mktemp("eight")
    files = {(name, value): data for value in EIGHT for name, data in files_of(value).items()}
    return write(folder, list(files.values())), list(files), list(files.values())


@pytest.mark.parametrize("loader", FAST_LOADERS)
@pytest.mark.parametrize("orientation", ["exif", "stored"])
def test_every_reader_turns_as_pillow_does(eight, tmp_path, orientation, loader):
    """No resize takes place: the shorter side has its target length. So the pixels are Pillow's,
    bit for bit."""
    split, names, files = eight
    given = dict(orientation=orientation, resize="shorter", resize_size=20, input_size=20)
    expected = [upright(data, orientation) for data in files]
    ours, plain = read(split, loader=loader, **given), read(split, loader="pil", **given)
    caches = [read_cached(split, loader=name, **given) for name in (loader, "pil")]
    stored = packed(split, tmp_path / "store", orientation=orientation, resize="shorter", resize_size=20)
    again = read(split, stored, loader=loader, **given)
    for row, name in enumerate(names):
        height, width, _ = expected[row].shape
        centre = expected[row][round((height - 20) / 2) :, round((width - 20) / 2) :][:20, :20]
        assert np.array_equal(ours[row], centre), name
        assert np.array_equal(plain[row], centre), name
        for cached in caches:
            assert np.array_equal(cached[row], expected[row]), name
        assert stored.size(row) == (height, width), name
        assert np.abs(again[row].astype(int) - centre).mean() < 2, name
        assert np.abs(by_pillow(stored.read(row).tobytes()).astype(int) - expected[row]).mean() < 2, name
    turned = [row for row, (_, value) in enumerate(names) if value >= 5 and "AVIF" not in names[row][0]]
    assert orientation == "stored" or all(expected[row].shape == (31, 20, 3) for row in turned)


@pytest.mark.parametrize("orientation", ["exif", "stored"])
def test_sizes_from_headers_are_those_of_the_pixels(eight, orientation):
    split, names, files = eight
    given = config(orientation=orientation, resize="shorter", resize_size=20, input_size=20)
    shapes = image_shapes(FileSource(split.paths), given)
    for row, name in enumerate(names):
        assert tuple(shapes[row]) == upright(files[row], orientation).shape[:2], name


def odd_files() -> dict[str, bytes]:
    """Metadata that says nothing usable, or says it oddly: Pillow's answer counts."""
    jpeg = encode(photo(20, 31), "JPEG")
    six = exif(6)
    return {
        "0": jpeg_with(jpeg, app1(exif(0))),
        "9": jpeg_with(jpeg, app1(exif(9))),
        "65535": jpeg_with(jpeg, app1(exif(65535))),
        "two values": jpeg_with(jpeg, app1(exif(6, count=2))),
        "a million values": jpeg_with(jpeg, app1(exif(6, count=10**6))),
        "type 77": jpeg_with(jpeg, app1(exif(6, kind=77))),
        "cut": jpeg_with(jpeg, app1(six[:14])),
        "empty": jpeg_with(jpeg, app1(b"")),
        "no TIFF": jpeg_with(jpeg, app1(b"garbage" * 5)),
        "entry outside": jpeg_with(jpeg, app1(six[:4] + b"\xff\xff\xff\x7f" + six[8:])),
        "two blocks": jpeg_with(jpeg, app1(exif(6)), app1(exif(3))),
        "two blocks, the first empty": jpeg_with(jpeg, app1(b""), app1(exif(6))),
        "split over two blocks": jpeg_with(jpeg, app1(six[:15]), app1(six[15:])),
        "EXIF says 1, XMP 6": jpeg_with(jpeg, app1(exif(1)), xap(6)),
        "XMP says 9": jpeg_with(jpeg, xap(9)),
        "XMP says 0": jpeg_with(jpeg, xap(0)),
        "APP1 of another kind": jpeg_with(jpeg, (0xE1, b"something else")),
        "fill bytes": jpeg[:2] + b"\xff\xff" + jpeg_with(jpeg, app1(six))[2:],
        "inside APP2": jpeg_with(jpeg, (0xE2, b"Exif\0\0" + six)),
        "PNG, garbage": png_with(encode(photo(20, 31), "PNG"), png_chunk(b"eXIf", b"garbage")),
        "PNG, empty": png_with(encode(photo(20, 31), "PNG"), png_chunk(b"eXIf", b"")),
        "PNG, 9": png_with(encode(photo(20, 31), "PNG"), png_chunk(b"eXIf", exif(9))),
        "PNG, a comment": png_with(encode(photo(20, 31), "PNG"), png_chunk(b"tEXt", b"Comment\0Hello")),
        "WebP, garbage": encode(photo(20, 31), "WEBP", exif=b"Exif\0\0garbage"),
        "WebP, 0": encode(photo(20, 31), "WEBP", exif=b"Exif\0\0" + exif(0)),
        "TIFF, 9": encode(photo(20, 31), "TIFF", tiffinfo={274: 9}),
    }


@pytest.mark.parametrize("loader", FAST_LOADERS)
def test_odd_metadata_is_what_pillow_says(tmp_path, loader):
    given = dict(orientation="exif", resize="shorter", resize_size=20, input_size=20)
    files = odd_files()
    split = write(tmp_path / "images", list(files.values()))
    ours, plain = read(split, loader=loader, **given), read(split, loader="pil", **given)
    cached = read_cached(split, loader=loader, **given)
    stored = packed(split, tmp_path / "store", orientation="exif", resize="shorter", resize_size=20)
    for row, (name, data) in enumerate(files.items()):
        try:
            expected = upright(data, "exif")
        except Exception:  # broken EXIF on which Pillow gives up is no reason to lose the image
            expected = by_pillow(data)
        assert np.array_equal(cached[row], expected), name
        assert np.array_equal(ours[row], plain[row]), name
        assert stored.size(row) == expected.shape[:2], name
    assert cached[list(files).index("fill bytes")].shape == (31, 20, 3)


def test_a_jpeg_keeps_all_but_its_metadata():
    jpeg = encode(photo(20, 31), "JPEG", comment=b"kept", icc_profile=b"kept too")
    noisy = jpeg_with(jpeg, app1(exif(5)), xap(3))
    structure = inspect(noisy)
    assert with_orientation(noisy, structure.metadata, 1) == jpeg
    turned = with_orientation(noisy, structure.metadata, 6)
    assert turned.startswith(jpeg[:2] + b"\xff\xe1") and turned.endswith(jpeg[2:])
    with Image.open(io.BytesIO(turned)) as image:
        assert dict(image.getexif()) == {0x0112: 6}


def test_a_packed_jpeg_of_the_right_size_is_kept_unless_it_is_turned(tmp_path):
    jpeg = encode(photo(24, 24), "JPEG")
    files = [jpeg_with(jpeg, app1(exif(value))) for value in (1, 6)]
    split = write(tmp_path / "images", files)
    store = packed(split, tmp_path / "exif", orientation="exif")
    assert store.read(0).tobytes() == jpeg  # without its EXIF, so that nothing turns it later
    assert np.abs(by_pillow(store.read(1).tobytes()).astype(int) - upright(files[1], "exif")).mean() < 2
    store = packed(split, tmp_path / "stored", orientation="stored")
    assert [store.read(row).tobytes() for row in (0, 1)] == files


def test_a_store_of_another_orientation_is_refused(tmp_path):
    split = write(tmp_path / "images", [encode(photo(), "JPEG")])
    catalog = Catalog("csv", str(tmp_path / "images"), split, None, None, ("class",))
    upright_store = packed(split, tmp_path / "store", orientation="exif").store
    assert upright_store.header["orientation"] == "exif"
    upright_store.check(catalog, "square", 24, "exif")
    with pytest.raises(UserError, match="--orientation is exif .*--orientation stored"):
        upright_store.check(catalog, "square", 24)
    older = packed(split, tmp_path / "older").store
    del older.header["orientation"]  # as stores were written before there was a choice
    older.check(catalog, "square", 24, "stored")
    with pytest.raises(UserError, match="--orientation is stored .* exif"):
        older.check(catalog, "square", 24, "exif")
    with pytest.raises(UserError, match="--orientation sideways"):
        packed(split, tmp_path / "none", orientation="sideways")
