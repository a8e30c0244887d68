"""More than 8 bits a channel, scaled alike by every reader; what Pillow decodes stays lossless."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastirt.images.decoders.dali import DaliDecoder
from fastirt.images.formats.header_check import inspect
from fastirt.images.formats.pillow import lossless
from fastirt.images.prepare import prepare
from tests.helpers import CPU, FAST_LOADERS, needs_dali
from tests.images.image_files import (
    SIDE,
    by_pillow,
    config,
    encode,
    packed,
    photo,
    png_chunk,
    read,
    write,
)

GREY16 = np.random.default_rng(2).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
GREY16[0, :2] = 0, 65535


def npy(values, kind="TIFF", **options) -> bytes:
    return encode(Image.fromarray(np.asarray(values)), kind, **options)


def colour16() -> tuple[bytes, np.ndarray]:
    """A PNG of 16 bits a channel, by hand: Pillow does not write it."""
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


@pytest.mark.parametrize("loader", FAST_LOADERS)
def test_deep_images_are_the_same_by_every_decoder(tmp_path, loader):
    split = write(tmp_path / "images", [data for data, _ in deep_images().values()])
    ours, plain = read(split, loader=loader), read(split, loader="pil")
    assert sorted(ours) == sorted(plain) == list(range(len(split)))
    assert all(np.array_equal(ours[row], plain[row]) for row in ours)


@needs_dali
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 30), (1100, 1000)])
def test_what_pillow_hands_on_is_lossless(size):
    image = photo(*size)
    data = np.frombuffer(lossless(image), np.uint8)
    sizes = np.array([size])
    decoded = DaliDecoder(1, 1, 1, CPU).decode_whole([data], sizes, sizes)[0]
    assert np.array_equal(decoded.numpy(), np.asarray(image)) and inspect(data).plain


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_a_large_image_is_handed_on_small_and_a_strip_is_not_blown_up(tmp_path, resize):
    given = config(resize=resize, resize_size=32)
    data, size = prepare(np.frombuffer(encode(photo(600, 900), "TIFF"), np.uint8), "x", given)
    assert size == ((32, 32) if resize == "square" else (32, 48)) and len(data) < 5000
    given = config(resize=resize, resize_size=1024)
    data, size = prepare(np.frombuffer(encode(photo(1, 200), "TIFF"), np.uint8), "x", given)
    assert size == ((1024, 1024) if resize == "square" else (1, 200))
