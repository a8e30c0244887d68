"""Images by Pillow: opened safely, turned upright, and converted to 8-bit RGB.

The pixels are those of `Image.open(file).convert("RGB")`, with orientation "exif" after
`ImageOps.exif_transpose`. (Pillow always turns TIFF files while loading.) Animations give their
first frame; transparency is dropped. Values that `convert` would clip are scaled instead:

    16 bits per channel   value / 257, rounded: 65535 becomes 255
                          (color: Pillow keeps the upper byte, at most 1 less)
    12-bit gray (TIFF)    value · 255 / 4095
    32-bit integers       the smallest of 255, 65535 and 2^31 - 1 that no value exceeds becomes 255
    floating point        likewise, of 1, 255 and 65535; NaN and infinity are 0
    negative or larger    the smallest value of the image becomes 0, the largest 255
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any, BinaryIO, Iterator

import numpy as np
from PIL import ExifTags, Image

from fastirt.images.formats.foreign import kind_of
from fastirt.images.formats.structure import Broken, complaint

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass  # HEIC files are rejected with a hint to install it

_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_START = 2**16  # bytes read to identify a file and to check its header
_ICON_SIDE = 1024

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = frozenset((5, 6, 7, 8))  # height and width change places

Image.init()  # imports all plugins now, because reading threads must not import them
# Pillow's warnings about metadata and palettes would appear among the log lines.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Raster formats that Pillow decodes itself and recognizes by content. Never EPS or WMF, which start
# other programs.
_SAFE = "JPEG PNG WEBP BMP GIF TIFF PPM AVIF HEIF JPEG2000 ICO PSD QOI DDS SGI PCX SUN DIB IM MSP XBM"
FORMATS = tuple(name for name in _SAFE.split() if name in Image.OPEN)


def open_image(source: bytes | BinaryIO) -> Image.Image:
    """Open without decoding: `size` and metadata are known. Raises Broken for unsupported files."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - len(_TGA_FOOTER)))
    formats = ("TGA",) if file.read() == _TGA_FOOTER else FORMATS
    file.seek(0)
    try:
        image = Image.open(file, formats=formats)
    except Image.UnidentifiedImageError:
        raise Broken(kind_of(_start(file))) from None
    except Exception as error:  # Pillow raises nearly anything on a broken header
        raise Broken(complaint(error, "opened")) from None
    if image.format in _TRAPS:
        try:
            problem = _TRAPS[image.format](image, _start(file))
        except Exception as error:
            problem = complaint(error, "opened")
        if problem:
            raise Broken(problem)
    return image


def _start(file: BinaryIO) -> bytes:
    """The first bytes; keeps the file's position."""
    at = file.tell()
    file.seek(0)
    start = file.read(_START)
    file.seek(at)
    return start


def orientation_of(image: Image.Image) -> int:
    """1 to 8, as Pillow reads it from EXIF or XMP; 1 if it is missing or invalid."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if value in TURNS else 1
    except Exception:  # Pillow raises nearly anything on broken EXIF; the image itself is usable
        return 1


def upright_size(image: Image.Image, orientation: str) -> tuple[int, int]:
    """(height, width) of the result of `rgb`, from the header alone."""
    width, height = image.size
    if image.format == "TIFF":  # `size` respects the tag already, but not XMP
        sideways = orientation_of(image) in SIDEWAYS and image.tag_v2.get(ExifTags.Base.Orientation) not in SIDEWAYS
    else:
        sideways = orientation == "exif" and orientation_of(image) in SIDEWAYS
    return (width, height) if sideways else (height, width)


def rgb(image: Image.Image, orientation: str) -> Image.Image:
    """The decoded 8-bit RGB image, upright for "exif". Raises any of Pillow's exceptions."""
    image.load()
    method = TURNS.get(orientation_of(image)) if orientation == "exif" else None
    scale = _full_scale(image)
    if method is not None:
        image = image.transpose(method)
    if scale is not None:
        return Image.fromarray(_to_8_bits(image, *scale)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def lossless(image: Image.Image) -> bytes:
    """An RGB image as a lossless file: BMP, or PNG if it is large."""
    out = io.BytesIO()
    if image.width * image.height <= 2**20:
        image.save(out, "BMP")
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _full_scale(image: Image.Image) -> tuple[float, float] | None:
    """(value that becomes 0, value that becomes 255) for channels above 8 bits, else None."""
    if image.mode.startswith("I;16"):
        twelve = image.format == "TIFF" and tuple(image.tag_v2.get(258, ())) == (12,)
        return 0, 4095 if twelve else 65535
    if image.mode not in ("I", "F"):
        return None
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 0, 65535
    low, high = _range(image)
    scales = (1, 255, 65535) if image.mode == "F" else (255, 65535, 2**31 - 1)
    fitting = [scale for scale in scales if low >= 0 and high <= scale]
    return (0, fitting[0]) if fitting else (low, high)


_BAND_PIXELS = 2**20  # converted at a time, so that no whole image is held in double precision


def _bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float64 array) of bands of rows, with NaN and infinity as 0."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))), np.float64)
        yield top, np.nan_to_num(band, nan=0, posinf=0, neginf=0)


def _range(image: Image.Image) -> tuple[float, float]:
    ranges = [(band.min(), band.max()) for _, band in _bands(image)]
    return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))


def _to_8_bits(image: Image.Image, low: float, high: float) -> np.ndarray:
    """(H, W) uint8: low becomes 0, high 255."""
    out = np.empty((image.height, image.width), np.uint8)
    for top, band in _bands(image):
        out[top : top + len(band)] = np.clip(np.rint((band - low) * (255 / max(high - low, 1e-300))), 0, 255)
    return out


def _preview(image: Any, start: bytes) -> str | None:
    """Problem of camera raw files: DNGVersion, CR2's mark, or a reduced first image."""
    reduced = image.tag_v2.get(254, 0)  # NewSubfileType
    if 50706 in image.tag_v2 or start[8:10] == b"CR" or (isinstance(reduced, int) and reduced & 1):
        return "camera RAW, which is not supported (its TIFF header holds only a preview)"
    return None


def _large_icon(image: Any, start: bytes) -> str | None:
    """Problem of icons whose inner images claim huge sizes, which Pillow does not check."""
    for entry in range(int.from_bytes(start[4:6], "little")):
        at = int.from_bytes(start[6 + 16 * entry + 12 : 6 + 16 * entry + 16], "little")
        image.fp.seek(at)
        head = image.fp.read(24)
        places, order = ((16, 20), "big") if head[:4] == b"\x89PNG" else ((4, 8), "little")
        sides = [abs(int.from_bytes(head[i : i + 4], order, signed=True)) for i in places]
        if max(sides) > _ICON_SIDE:
            return f"icon with an image of more than {_ICON_SIDE} pixels a side"
    image.fp.seek(0)
    return None


def _other_codestream(image: Any, start: bytes) -> str | None:
    """Problem of JPEG 2000 files with two sizes: OpenJPEG allocates the codestream's."""
    at = start.find(b"\xff\x4f\xff\x51")
    right, bottom, left, top = struct.unpack_from(">4I", start, at + 8)
    return None if at >= 0 and image.size == (right - left, bottom - top) else "JPEG 2000 with two sizes"


# Checks of files that Pillow opens and that would be decoded wrongly or need too much memory.
_TRAPS = {"TIFF": _preview, "ICO": _large_icon, "JPEG2000": _other_codestream}
