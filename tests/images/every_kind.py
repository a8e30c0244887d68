"""A file of every kind that Pillow reads, by name."""

import struct

import numpy as np
from PIL import Image, features

from tests.images.image_files import (
    SIDE,
    encode,
    jpeg_without,
    photo,
    png_chunk,
    png_with,
    with_alpha,
)


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


def every_kind() -> dict[str, bytes]:
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
