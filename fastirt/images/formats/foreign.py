"""Names of unsupported file formats, for error messages."""

from __future__ import annotations

_STARTS = {
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"FUJIFILMCCD-RAW": "camera RAW (RAF)",
    b"IIRO": "camera RAW (ORF)",
    b"IIRS": "camera RAW (ORF)",
    b"MMOR": "camera RAW (ORF)",
    b"IIU\0": "camera RAW (RW2)",
    b"FOVb": "camera RAW (X3F)",
    b"\0MRM": "camera RAW (MRW)",
    b"\x1aE\xdf\xa3": "video (Matroska or WebM)",
    b"\0\0\x01\xba": "video (MPEG)",
    b"\0\0\x01\xb3": "video (MPEG)",
    b"FLV\x01": "video (FLV)",
    b"OggS": "Ogg audio or video",
    b"ID3": "audio (MP3)",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"GIF8": "broken GIF",
    b"8BPS": "broken PSD",
    b"\0\0\x01\0": "broken icon",
    b"\0\0\0\x0cjP  ": "broken JPEG 2000",
    b"\xff\x4f\xff\x51": "broken JPEG 2000",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"SIMPLE  =": "FITS",
    b"icns": "Apple icon",
    b"gimp xcf": "GIMP file",
    b"AT&TFORM": "DjVu",
    b"PK\x03\x04": "ZIP archive (or an office document)",
    b"\x1f\x8b": "gzip archive",
    b"7z\xbc\xaf": "7z archive",
    b"Rar!": "RAR archive",
    b"\x93NUMPY": "NumPy array",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "SQLite database",
    b"MZ": "Windows program",
    b"\x7fELF": "program",
    b"version https://git-lfs": "Git LFS pointer, not the file itself (run `git lfs pull`)",
}
_RIFF = {b"AVI ": "video (AVI)", b"WAVE": "audio (WAV)"}
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def kind_of(data: bytes) -> str:
    """The format of a file that is no supported image, such as "PDF" or "broken TIFF"."""
    if data[:4] == b"RIFF" and data[8:12] in _RIFF:
        return _RIFF[data[8:12]]
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "camera RAW (CR2)" if data[8:10] == b"CR" else "broken TIFF"
    if data[128:132] == b"DICM":
        return "DICOM"
    for start, name in _STARTS.items():
        if data.startswith(start):
            return name
    if not any(data[:4096]):
        return "only zero bytes"
    return _text_kind(data[:4096]) or "not an image of a known kind"


def _iso_media(data: bytes) -> str:
    brand = data[8:12]
    if brand in (b"avif", b"avis"):
        return "AVIF that is broken or needs a newer Pillow"
    if brand in _HEIF:
        return "HEIC: install pillow-heif to read it"
    if brand == b"crx ":
        return "camera RAW (CR3)"
    return "video (MP4 or QuickTime)"


def _text_kind(start: bytes) -> str:
    """The kind of a text file, or "" for binary data."""
    if b"\0" in start.removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff")[::2] and b"\0" in start[1::2]:
        return ""
    lowered = start.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower().replace(b"\0", b"")
    if b"<svg" in lowered:
        return "SVG"
    if lowered.startswith((b"<!doctype html", b"<html")):
        return "HTML page"
    if lowered.startswith(b"<?xml"):
        return "XML"
    control = sum(byte < 9 or 13 < byte < 32 for byte in lowered)
    return "a text file" if lowered and not control and _is_utf8(lowered) else ""


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return len(data) - error.start < 4  # the last character may be cut off
    return True
