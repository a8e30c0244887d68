"""Images by Pillow: opened safely, turned upright, and brought to 8-bit RGB.

The pixels are those of `Image.open(file).convert("RGB")`, with orientation "exif" those of `ImageOps.exif_transpose` before it.
(TIFF is turned by Pillow itself while loading, whatever the orientation asked for.) Animations give their first frame, transparency is
dropped. Where `convert` would cut off values, they are scaled instead:

    16 bits a channel     value / 257, rounded: 65535 becomes 255 (colour: Pillow keeps the upper byte, at most 1 less)
    12-bit grey (TIFF)    value · 255 / 4095
    32-bit integers       the smallest of 255, 65535 and 2^31 - 1 that no value exceeds becomes 255
    floating point        likewise, of 1, 255 and 65535; NaN and infinity are 0
    negative or larger    the image's own smallest value becomes 0, its largest 255
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
    pass  # a HEIC file is then refused by name

_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_START = 2**16  # bytes read to name a file, and to see through headers that lie
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

Image.init()  # all plugins now: reading threads must not be the first to import them
# Oddities in metadata and palettes would be printed once for each kind among the user's log lines.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Raster formats that Pillow decodes by itself. Never EPS or WMF, which start other programs; none that is told by its name alone.
_SAFE = "JPEG PNG WEBP BMP GIF TIFF PPM AVIF HEIF JPEG2000 ICO PSD QOI DDS SGI PCX SUN DIB IM MSP XBM"
FORMATS = tuple(name for name in _SAFE.split() if name in Image.OPEN)


def open_image(source: bytes | BinaryIO) -> Image.Image:
    """Opened and not decoded yet: `size` and metadata are known. Raises Broken for what is no image that we read."""
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
    """The first bytes; the file stays where it was."""
    at = file.tell()
    file.seek(0)
    start = file.read(_START)
    file.seek(at)
    return start


def orientation_of(image: Image.Image) -> int:
    """1 to 8, as Pillow reads it from EXIF or XMP; 1 where there is none or it makes no sense."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if value in TURNS else 1
    except Exception:  # Pillow raises nearly anything on broken EXIF, which is no reason to lose the image
        return 1


def upright_size(image: Image.Image, orientation: str) -> tuple[int, int]:
    """(height, width) that `rgb` will have, from the header alone."""
    width, height = image.size
    if image.format == "TIFF":  # `size` takes the tag into account already, XMP not yet
        sideways = orientation_of(image) in SIDEWAYS and image.tag_v2.get(ExifTags.Base.Orientation) not in SIDEWAYS
    else:
        sideways = orientation == "exif" and orientation_of(image) in SIDEWAYS
    return (width, height) if sideways else (height, width)


def rgb(image: Image.Image, orientation: str) -> Image.Image:
    """The decoded image, 8-bit RGB; "exif": upright. Raises what Pillow raises."""
    image.load()
    method = TURNS.get(orientation_of(image)) if orientation == "exif" else None
    scale = _full_scale(image)
    if method is not None:
        image = image.transpose(method)
    if scale is not None:
        return Image.fromarray(_to_8_bits(image, *scale)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def lossless(image: Image.Image) -> bytes:
    """An RGB image as a file that every decoder reads to the same pixels: BMP, or PNG where that would be large."""
    out = io.BytesIO()
    if image.width * image.height <= 2**20:
        image.save(out, "BMP")
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _full_scale(image: Image.Image) -> tuple[float, float] | None:
    """(value that becomes 0, value that becomes 255) for channels of more than 8 bits, else None."""
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


_ROWS = 2**20  # pixels converted at a time: an image is not held in double precision as a whole


def _bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """Bands of rows as float64 arrays without NaN and infinity."""
    rows = max(1, _ROWS // image.width)
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
    """A camera's raw data in a TIFF: DNGVersion, CR2's mark, or a first image that is a reduced one (NewSubfileType)."""
    reduced = image.tag_v2.get(254, 0)
    if 50706 in image.tag_v2 or start[8:10] == b"CR" or (isinstance(reduced, int) and reduced & 1):
        return "camera RAW, which is not supported (its TIFF header shows a preview only)"
    return None


def _large_icon(image: Any, start: bytes) -> str | None:
    """The images inside an icon have headers of their own, which Pillow believes."""
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
    """A JPEG 2000 file says its size twice; OpenJPEG takes memory for the codestream's."""
    at = start.find(b"\xff\x4f\xff\x51")
    right, bottom, left, top = struct.unpack_from(">4I", start, at + 8)
    return None if at >= 0 and image.size == (right - left, bottom - top) else "JPEG 2000 with two sizes"


_TRAPS = {"TIFF": _preview, "ICO": _large_icon, "JPEG2000": _other_codestream}
