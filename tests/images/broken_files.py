"""Broken files of many kinds, by name."""

import struct

import numpy as np

from tests.images.image_files import encode, noise, png_chunk


def encoded(kind: str = "JPEG", **options) -> bytes:
    return encode(noise(30, 40), kind, **options)


def png_with_header(width: int, height: int) -> bytes:
    data = encoded("PNG")
    return data[:8] + png_chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]


def jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(encoded())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def swap(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def broken_files() -> dict[str, bytes]:
    """Kinds of broken file, by name. The last few pass any check of the structure and fail in the
    decoder alone."""
    jpeg, png, webp, bmp = encoded(), encoded("PNG"), encoded("WEBP"), encoded("BMP")
    body = jpeg.index(b"\xff\xda") + 14
    noise = np.random.default_rng(1).integers(0, 256, 800, dtype=np.uint8).tobytes()
    return {
        "empty": b"",
        "one byte": b"\xff",
        "magic only": b"\xff\xd8\xff",
        "garbage": noise,
        "zeros": bytes(500),
        "text": b"not an image\n" * 40,
        "html": b"<!DOCTYPE html><html>404</html>",
        "header cut": jpeg[:100],
        "body cut": jpeg[: body + 200],
        "no end marker": jpeg[:-2],
        "empty scan": jpeg[:body] + b"\xff\xd9",
        "stray segment": jpeg[: body + 300] + b"\xff\xc4\x00\x20" + jpeg[body + 300 :],
        "bmp palette": bmp[:46] + b"\xff\xff\xff\x00" + bmp[50:],
        "webp flags": webp[:12] + b"VP8X\x0a\x00\x00\x00\xff" + bytes(9) + webp[12:],
        "no scan": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "no frame": jpeg[: jpeg.index(b"\xff\xc0")] + jpeg[jpeg.index(b"\xff\xc4") :],
        "no tables": swap(swap(jpeg, b"\xff\xdb", b"\xff\xfe"), b"\xff\xdb", b"\xff\xfe"),
        "garbage after magic": b"\xff\xd8" + noise,
        "zero height": jpeg_with_size(40, 0),
        "zero width": jpeg_with_size(0, 30),
        "huge": jpeg_with_size(60000, 60000),
        "12 bits": swap(jpeg, b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        "hierarchical": swap(jpeg, b"\xff\xc0", b"\xff\xc5"),
        "png cut": png[: len(png) // 2],
        "png checksum": png[:60] + b"\x00\x01" + png[62:],
        "png huge": png_with_header(50000, 50000),
        "png no data": png[:33] + png[-12:],
        "webp cut": webp[: len(webp) // 2],
        "webp header": webp[:15],
        "bmp cut": bmp[: len(bmp) // 2],
        "gif": b"GIF89a" + noise,
        "tiff": b"II*\x00" + noise,
        "segment too long": jpeg[:4] + b"\xff\xff" + jpeg[6:],
    }


def undecodable() -> bytes:
    """Whole in structure, but its coded data means nothing: only a decoder finds out."""
    png = encoded("PNG")
    at = png.index(b"IDAT") - 4
    length = struct.unpack_from(">I", png, at)[0]
    return png[:at] + png_chunk(b"IDAT", bytes(length)) + png[at + 12 + length :]
