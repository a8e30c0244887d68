"""Whatever Pillow opens is read, to Pillow's pixels, by DALI, the plain twin and `pack` alike; the rest is refused by name."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from fastirt.images.formats.header_check import BadImage, inspect
from fastirt.images.formats.pillow import FORMATS, lossless
from tests.helpers import needs_dali
from tests.images.image_files import (
    SIDE,
    by_pillow,
    encode,
    jpeg_without,
    packed,
    photo,
    png_chunk,
    png_with,
    read,
    with_alpha,
    write,
)

GREY16 = np.random.default_rng(2).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
GREY16[0, :2] = 0, 65535


def bmp_with_header(size: int) -> bytes:
    """A 24-bit BMP whose header is a BITMAPV4HEADER (108 bytes) or BITMAPV5HEADER (124)."""
    data = encode(photo(), "BMP")
    head = struct.pack("<I", size) + data[18:54] + bytes(size - 40)
    return data[:10] + struct.pack("<I", 14 + size) + head + data[54:]


def bmp_with_masks() -> bytes:
    """32 bits a pixel in an unusual order of channels, as bit masks say."""
    pixels = np.concatenate([np.asarray(photo())[::-1], np.zeros((SIDE, SIDE, 1), np.uint8)], 2)
    head = struct.pack("<IiiHHIIiiII", 108, SIDE, SIDE, 1, 32, 3, 0, 0, 0, 0, 0)
    head += struct.pack("<IIII", 0xFF, 0xFF00, 0xFF0000, 0xFF000000) + bytes(52)
    return b"BM" + struct.pack("<IHHI", 122 + pixels.size, 0, 0, 122) + head + pixels.tobytes()


def animated(kind: str, **options) -> bytes:
    return encode(photo(), kind, save_all=True, append_images=[photo(seed=5), photo(seed=6)], **options)


def images_as_pillow_reads_them() -> dict[str, bytes]:
    cmyk, jpeg = encode(photo(mode="CMYK"), "JPEG", quality=95), encode(photo(), "JPEG")
    ycck = cmyk.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
    assert cmyk != ycck
    found = {
        "JPEG": jpeg,
        "grey JPEG": encode(photo(mode="L"), "JPEG"),
        "progressive JPEG": encode(photo(), "JPEG", progressive=True),
        "CMYK": cmyk,
        "CMYK without Adobe marker": jpeg_without(cmyk, 0xEE),
        "plain CMYK without Adobe marker": jpeg_without(
            encode(Image.eval(photo(mode="CMYK"), lambda v: 255 - v), "JPEG"), 0xEE
        ),
        "YCCK": ycck,
        "RGB JPEG": encode(photo(), "JPEG", keep_rgb=True),
        "arithmetic JPEG": jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1),
        "progressive arithmetic JPEG": encode(photo(), "JPEG", progressive=True).replace(b"\xff\xc2", b"\xff\xca", 1),
        "two images in a JPEG (MPO)": encode(photo(), "MPO", save_all=True, append_images=[photo(seed=5)]),
        "PNG": encode(photo(), "PNG"),
        "PNG with alpha": encode(with_alpha(), "PNG"),
        "grey PNG with alpha": encode(with_alpha("LA"), "PNG"),
        "1-bit PNG": encode(photo(mode="1"), "PNG"),
        "palette PNG": encode(photo().quantize(100), "PNG"),
        "2-bit palette PNG": encode(photo().quantize(4), "PNG"),
        "palette PNG, one colour transparent": encode(photo().quantize(100), "PNG", transparency=3),
        "palette PNG, an alpha a colour": encode(photo().quantize(100), "PNG", transparency=bytes(range(100))),
        "PNG with a transparent colour": encode(photo(), "PNG", transparency=(9, 8, 7)),
        "grey PNG with a transparent grey": encode(photo(mode="L"), "PNG", transparency=9),
        "PNG with gamma": png_with(encode(photo(), "PNG"), png_chunk(b"gAMA", struct.pack(">I", 200_000))),
        "animated PNG": animated("PNG"),
        "WebP": encode(photo(), "WEBP"),
        "lossless WebP with alpha": encode(with_alpha(), "WEBP", lossless=True),
        "animated WebP": animated("WEBP"),
        "animated lossless WebP": animated("WEBP", lossless=True),
        "BMP": encode(photo(), "BMP"),
        "BMP with alpha": encode(with_alpha(), "BMP"),
        "palette BMP": encode(photo().quantize(100), "BMP"),
        "BMP of version 4": bmp_with_header(108),
        "BMP of version 5": bmp_with_header(124),
        "BMP with bit masks": bmp_with_masks(),
        "GIF": encode(photo(), "GIF"),
        "GIF with transparency": encode(with_alpha(), "GIF"),
        "animated GIF": animated("GIF"),
        "TIFF": encode(photo(), "TIFF"),
        "LZW TIFF": encode(photo(), "TIFF", compression="tiff_lzw"),
        "deflate TIFF": encode(photo(), "TIFF", compression="tiff_adobe_deflate"),
        "JPEG TIFF": encode(photo(), "TIFF", compression="jpeg"),
        "CMYK TIFF": encode(photo(mode="CMYK"), "TIFF"),
        "fax TIFF": encode(photo(mode="1"), "TIFF", compression="group4"),
        "TIFF with alpha": encode(with_alpha(), "TIFF"),
        "BigTIFF": encode(photo(), "TIFF", big_tiff=True),
        "TIFF of many pages": encode(photo(), "TIFF", save_all=True, append_images=[photo(seed=5)]),
        "PPM": encode(photo(), "PPM"),
        "PGM": encode(photo(mode="L"), "PPM"),
        "PBM": encode(photo(mode="1"), "PPM"),
        "PPM as text": b"P3 24 24 255\n" + b" ".join(b"%d" % v for v in np.asarray(photo()).ravel()),
        "JPEG 2000": encode(photo(), "JPEG2000"),
        "JPEG 2000 codestream": encode(photo(), "JPEG2000", no_jp2=True),
        "icon": encode(photo(), "ICO", sizes=[(SIDE, SIDE)]),
        "icon of BMPs": encode(photo(), "ICO", sizes=[(SIDE, SIDE)], bitmap_format="bmp"),
        "TGA": encode(photo(), "TGA"),
        "compressed TGA": encode(photo(), "TGA", compression="tga_rle"),
        "PCX": encode(photo(), "PCX"),
        "SGI": encode(photo(), "SGI"),
        "DDS": encode(photo(), "DDS"),
        "DIB": encode(photo(), "DIB"),
        "IM": encode(photo(), "IM"),
        "MSP": encode(photo(mode="1"), "MSP"),
        "XBM": encode(photo(mode="1"), "XBM"),
        "QOI": encode(photo(), "QOI") if "QOI" in Image.SAVE else encode(photo(), "PPM"),
    }
    if features.check("avif"):
        found |= {"AVIF": encode(photo(), "AVIF"), "AVIF with alpha": encode(with_alpha(), "AVIF")}
        found["animated AVIF"] = animated("AVIF")
    return found


NAMES = list(images_as_pillow_reads_them())


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """One file of each kind, and what each reader makes of it."""
    folder = tmp_path_factory.mktemp("kinds")
    split = write(folder / "images", list(images_as_pillow_reads_them().values()))
    readers = {
        "dali": read(split),
        "pil": read(split, loader="pil"),
        "dali, upright": read(split, orientation="exif"),
        "packed": read(split, packed(split, folder / "store")),
        "resized by dali": read(split, resize_size=40, input_size=40),
        "resized by pil": read(split, resize_size=40, input_size=40, loader="pil"),
    }
    return readers


@needs_dali
@pytest.mark.parametrize("name", NAMES)
def test_every_reader_gives_pillow_s_pixels(every_kind, name):
    row, data = NAMES.index(name), images_as_pillow_reads_them()[name]
    expected = by_pillow(data)
    for reader in ("dali", "pil", "dali, upright"):
        assert np.array_equal(every_kind[reader][row], expected), reader
    assert np.abs(every_kind["packed"][row].astype(int) - expected).mean() < (4 if "1-bit" in name else 1.5)
    resized = every_kind["resized by pil"][row].astype(int)
    assert np.array_equal(resized, np.asarray(Image.fromarray(expected).resize((40, 40), 3)))
    difference = np.abs(every_kind["resized by dali"][row] - resized)
    assert difference.mean() < (2.5 if "1-bit" in name else 0.3)  # black and white dots: DALI rounds once, Pillow twice
    if not inspect(data).plain:  # resized by Pillow already
        assert difference.max() == 0


def test_formats_that_start_other_programs_are_never_opened(tmp_path):
    assert not {"EPS", "WMF", "PDF", "GRIB", "HDF5", "BUFR"} & set(FORMATS)
    with pytest.raises(BadImage, match="PostScript"):
        inspect(encode(photo(), "EPS"))


def npy(values, kind="TIFF", **options) -> bytes:
    return encode(Image.fromarray(np.asarray(values)), kind, **options)


def colour16() -> tuple[bytes, np.ndarray]:
    """A PNG of 16 bits a channel, by hand: Pillow does not write it."""
    import zlib

    values = np.random.default_rng(3).integers(0, 65536, (SIDE, SIDE, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks, values


def deep_images() -> dict[str, tuple[bytes, np.ndarray]]:
    """Images of more than 8 bits a channel, and what they are in 8."""
    unit = np.random.default_rng(4).random((SIDE, SIDE)).astype(np.float32)
    by_257 = np.rint(GREY16 / 257)
    floats = unit.copy()
    floats[0, :3] = np.nan, np.inf, -np.inf
    with_zeros = np.where(np.isfinite(floats), floats, 0)
    signed = (unit * 2000 - 1000).round()
    spread = (unit - unit.min()) / (unit.max() - unit.min())
    return {
        "16-bit PNG": (npy(GREY16, "PNG"), by_257),
        "16-bit PNG, dark": (npy(GREY16 // 100, "PNG"), np.rint(GREY16 // 100 / 257)),
        "16-bit colour PNG": (colour16()[0], colour16()[1] // 256),
        "16-bit TIFF": (npy(GREY16), by_257),
        "16-bit TIFF, big-endian": (npy(GREY16.astype(">u2")), by_257),
        "16-bit PGM": (b"P5 24 24 65535\n" + GREY16.astype(">u2").tobytes(), by_257),
        "32-bit TIFF of 16-bit values": (npy(GREY16.astype(np.int32)), by_257),
        "32-bit TIFF of 8-bit values": (npy((GREY16 // 257).astype(np.int32)), GREY16 // 257),
        "32-bit TIFF": (npy(GREY16.astype(np.int32) * 32768), np.rint(GREY16 * 32768.0 * 255 / (2**31 - 1))),
        "TIFF of floats up to 1": (npy(unit), np.rint(unit * 255)),
        "TIFF of floats up to 255": (npy(unit * 254 + 1), np.rint(unit * 254 + 1)),
        "TIFF of floats with NaN": (npy(floats), np.rint(with_zeros * 255)),
        "TIFF of negative floats": (npy(unit * 6 - 3), np.rint(spread * 255)),
        "TIFF of negative integers": (
            npy(signed.astype(np.int32)),
            np.rint((signed - signed.min()) * 255 / (signed.max() - signed.min())),
        ),
        "constant TIFF": (npy(np.full((SIDE, SIDE), -7, np.float32)), np.zeros((SIDE, SIDE))),
    }


def test_more_than_8_bits_are_scaled(tmp_path):
    cases = deep_images()
    split = write(tmp_path / "images", [data for data, _ in cases.values()])
    found = read(split, loader="pil")
    again = packed(split, tmp_path / "store")
    for row, (name, (_, expected)) in enumerate(cases.items()):
        expected = expected.astype(int)
        expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, 2)
        assert np.abs(found[row] - expected).max() <= (1 if "float" in name else 0), name
        assert np.abs(by_pillow(again.read(row).tobytes()).astype(int) - expected).mean() < 2.5, name
    assert found[0][0, 0].tolist() == [0, 0, 0] and found[0][0, 1].tolist() == [255, 255, 255]


@needs_dali
def test_deep_images_are_the_same_by_dali(tmp_path):
    split = write(tmp_path / "images", [data for data, _ in deep_images().values()])
    ours, plain = read(split), read(split, loader="pil")
    assert sorted(ours) == sorted(plain) == list(range(len(split)))
    assert all(np.array_equal(ours[row], plain[row]) for row in ours)


@needs_dali
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 30), (1100, 1000)])
def test_what_pillow_hands_on_is_lossless(size):
    from fastirt.images.decode_dali import DaliDecoder
    from tests.images.image_files import CPU

    image = photo(*size)
    data = np.frombuffer(lossless(image), np.uint8)
    sizes = np.array([size])
    decoded = DaliDecoder(1, 1, 1, CPU).decode_whole([data], sizes, sizes)[0]
    assert np.array_equal(decoded.numpy(), np.asarray(image)) and inspect(data).plain


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_a_large_image_is_handed_on_small_and_a_strip_is_not_blown_up(tmp_path, resize):
    from fastirt.images.prepare import prepare
    from tests.images.image_files import config

    given = config(resize=resize, resize_size=32)
    data, size = prepare(np.frombuffer(encode(photo(600, 900), "TIFF"), np.uint8), "x", given)
    assert size == ((32, 32) if resize == "square" else (32, 48)) and len(data) < 5000
    data, size = prepare(
        np.frombuffer(encode(photo(1, 200), "TIFF"), np.uint8), "x", config(resize=resize, resize_size=1024)
    )
    assert size == ((1024, 1024) if resize == "square" else (1, 200))


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
    tag = struct.pack("<HH", 256, tiff[tiff.index(struct.pack("<H", 256), 8) + 2])  # ImageWidth and its type
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
    import resource

    data = bombs()[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage):
        inspect(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


QUIET = """
import sys
from pathlib import Path
from tests.images.image_files import *
from tests.images.test_formats import images_as_pillow_reads_them
files = list(images_as_pillow_reads_them().values())
files += [encode(Image.new("1", (12000, 9000)), "TIFF", compression="group4"), encode(photo(), "TIFF")[:-50]]
files += [encode(photo(), kind)[:300] for kind in ("TIFF", "GIF", "AVIF", "JPEG2000", "PPM")]
split = write(Path(sys.argv[1]), files)
print(len(read(split, loader="pil", orientation="exif")), len(files))
"""


@pytest.mark.slow
def test_pillow_prints_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    read_rows, written = map(int, done.stdout.split())
    assert 0 < read_rows < written
    lines = [line for line in done.stderr.splitlines() if "bad image" not in line]
    assert not lines


MUTATED = """
import sys, time
from pathlib import Path
from tests.images.image_files import *
from tests.images.test_formats import images_as_pillow_reads_them
rng = np.random.default_rng(int(sys.argv[2]))
originals = list(images_as_pillow_reads_them().values())
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
    options = dict(resize="shorter" if number % 2 else "square", orientation="exif" if number % 4 < 2 else "stored", max_bad=10**6)
    start = time.monotonic()
    ours, plain = read(split, **options), read(split, loader="pil", **options)
    slowest = max(slowest, time.monotonic() - start)
    count += len(plain)
    if ours.keys() != plain.keys():
        print("read by one only:", [(row, "dali" if row in ours else "pil") for row in ours.keys() ^ plain.keys()], file=sys.stderr)
    for row in ours.keys() & plain.keys():
        assert np.abs(ours[row].astype(int) - plain[row]).mean() < 2, (number, row, options)
print(count, rounds * len(originals), round(slowest, 2))
"""


@pytest.mark.slow
@needs_dali
def test_mutated_files_of_every_kind_crash_nothing(tmp_path):
    """In a process of its own; readers that both read a file agree on it."""
    done = subprocess.run(
        [sys.executable, "-c", MUTATED, str(tmp_path), "0", "4"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    readable, files, _ = done.stdout.split()
    assert 0 < int(readable) < int(files)
