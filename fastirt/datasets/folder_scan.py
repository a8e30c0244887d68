"""The images in and below class folders, each file once, and a report of everything skipped."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Iterable

from fastirt.datasets.listing import inode_of
from fastirt.datasets.records import Image, counted, printable

# Formats that Pillow decodes on every system without another program, so neither EPS nor WMF. The
# list is fixed: if it changed with Pillow's version, packed stores and checkpoints would be stale.
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .pfm .avif .avifs "
    ".heic .heics .heif .heifs .hif .jp2 .j2k .j2c .jpc .jpf .jpx .tga .icb .vda .vst .ico .icns .cur .psd .qoi .dds "
    ".pcx .dcx .sgi .rgb .rgba .bw .ras .im .msp .xbm .xpm .blp .ftc .ftu .fli .flc .fit .fits .gbr .iim .pcd "
    ".pxr".split()
)
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
NAMED = 3  # examples in a message
_EXTENSION = re.compile(r"\.[a-z][a-z0-9]*~?")
_FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM.{4}\0{4}|II[*+]\0|MM\0[*+]|P[1-7][\s#]"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp(?:avif|avis|heic|heix|heim|heis|hevc|hevx|mif1|msf1)|8BPS|qoif|DDS ",
    re.DOTALL,
)


@dataclass
class Findings:
    """Everything a scan skipped."""

    root: str
    kinds: Counter = field(default_factory=Counter)  # extension -> number of non-image files
    classes: dict[str, int] = field(default_factory=dict)  # folder `__…` -> number of files
    loose: list[str] = field(default_factory=list)  # images outside class folders
    repeated: list[str] = field(default_factory=list)  # links to folders that are read already
    # link -> number of images behind it that belong to another class's folder
    foreign: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)  # dangling links and special files
    unreadable: list[str] = field(default_factory=list)  # folders that cannot be listed

    def warn(self) -> None:
        """Logs one warning per kind of finding."""
        log = logging.getLogger("fastirt").warning
        left_out = [f"{count:,} {kind}" for kind, count in self.kinds.most_common(8)]
        rest = sum(self.kinds.values()) - sum(count for _, count in self.kinds.most_common(8))
        left_out += [f"{rest:,} of other kinds"] if rest else []
        left_out += [f"class folder {printable(name)} ({files:,} files)" for name, files in self.classes.items()]
        if self.loose:
            left_out.append(
                f"{counted(len(self.loose), 'image', 'images')} in no class folder: {self._some(self.loose)}"
            )
        if left_out:
            log(f"{self.root}: left out: {', '.join(left_out)}")
        if self.foreign:
            number, links = sum(self.foreign.values()), list(self.foreign)
            log(
                f"{self.root}: left out, because the folder of another class holds them: "
                f"{counted(number, 'image', 'images')} behind {counted(len(links), 'link', 'links')}: "
                + self._some(links)
            )
        if self.repeated:
            leading = counted(len(self.repeated), "link leads", "links lead")
            log(f"{self.root}: {leading} to a folder that is read already, skipped: {self._some(self.repeated)}")
        if self.broken:
            leading = counted(len(self.broken), "link or special file leads", "links or special files lead")
            log(f"{self.root}: {leading} to no file or folder, skipped: {self._some(self.broken)}")
        if self.unreadable:
            folders = counted(len(self.unreadable), "folder", "folders")
            log(
                f"{self.root}: {folders} cannot be read (permission or disk error), skipped: "
                + self._some(self.unreadable)
            )

    def _some(self, paths: list[str]) -> str:
        names = [printable(os.path.relpath(path, self.root)) for path in paths[:NAMED]]
        return ", ".join(names) + (", …" if len(paths) > NAMED else "")


class Owners:
    """Class folder -> class, with links resolved: the class that owns a link's target."""

    def __init__(self, classes: Iterable[tuple[str, str]]) -> None:
        """classes: (absolute class folder, class) of all splits."""
        self._classes: dict[str, str] = {}
        linked: dict[str, set[str]] = {}
        for folder, label in classes:
            if os.path.islink(folder):
                linked.setdefault(os.path.realpath(folder), set()).add(label)
            else:
                self._classes[os.path.realpath(folder)] = label
        # A class folder that is a link owns its target, unless another class does or two share it.
        owned = {real: labels.pop() for real, labels in linked.items() if len(labels) == 1 and self.of(real) is None}
        self._classes.update(owned)

    def of(self, real: str) -> str | None:
        """The class whose folder is or contains the resolved folder `real`, or None."""
        while real not in self._classes:
            parent = os.path.dirname(real)
            if parent == real:
                return None
            real = parent
        return self._classes[real]


def entries(folder: str, findings: Findings) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """(folders, files) in a folder, sorted by name, without hidden and operating system files."""
    folders: list[os.DirEntry] = []
    files: list[os.DirEntry] = []
    try:
        with os.scandir(folder) as listing:
            every = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        findings.unreadable.append(folder)
        return folders, files
    for entry in every:
        name = entry.name.lower()
        if name.startswith(".") or name in SYSTEM_FOLDERS or name in SYSTEM_FILES:
            continue
        try:
            if entry.is_dir():
                folders.append(entry)
            elif entry.is_file():
                files.append(entry)
            else:
                findings.broken.append(entry.path)
        except OSError:  # a circular link, or no permission for the target
            findings.broken.append(entry.path)
    return folders, files


def is_image(entry: os.DirEntry) -> bool:
    """Whether the extension is an image's; without one (IMG.2019), the first bytes decide."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if _EXTENSION.fullmatch(suffix):
        return suffix in EXTENSIONS
    try:
        with open(entry.path, "rb") as file:
            return _FIRST_BYTES.match(file.read(16)) is not None
    except OSError:
        return False


def class_images(folder: str, label: str, owners: Owners, findings: Findings) -> list[Image]:
    """All images in and below a class folder, sorted by path; follows links, reads folders once."""
    images: list[Image] = []
    top = os.path.realpath(folder)
    seen = {_key(folder, top)}
    # (path, real path, link that led to the folder or "")
    folders = [(folder, top, folder if os.path.islink(folder) else "")]
    # Read last: files that are in the class folder itself keep their own path, not a link's.
    links: list[tuple[str, str, str]] = []
    while folders or links:
        if folders:
            path, real, link = folders.pop()
        else:
            path, real, link = links.pop(0)
            key = _key(path, real)
            if key in seen or is_above(real, top):
                findings.repeated.append(path)
                continue
            seen.add(key)
        owner = owners.of(real) if link else label
        inner, files = entries(path, findings)
        for image in _images(files, label, real, owners, findings):
            if owner in (None, label):
                images.append(image)
            else:
                findings.foreign[link] += 1
        for entry in inner:
            if entry.is_symlink():
                links.append((entry.path, os.path.realpath(entry.path), entry.path))
                continue
            inner_real = os.path.join(real, entry.name)
            key = _key(entry.path, inner_real)
            if key not in seen:
                seen.add(key)
                folders.append((entry.path, inner_real, link))
    return sorted(images)


def _images(files: list[os.DirEntry], label: str, real: str, owners: Owners, findings: Findings) -> Iterable[Image]:
    """The images among the files of one folder, without links into another class's folder."""
    for entry in files:
        if not is_image(entry):
            suffix = os.path.splitext(entry.name)[1].lower()
            findings.kinds[suffix if _EXTENSION.fullmatch(suffix) else "without extension"] += 1
        elif not entry.is_symlink():
            yield Image(entry.path, label, os.path.join(real, entry.name), entry.inode())
        else:
            target = os.path.realpath(entry.path)
            if owners.of(os.path.dirname(target)) in (None, label):
                yield Image(entry.path, label, target, inode_of(entry.path))
            else:
                findings.foreign[entry.path] += 1


def holds_images(folder: str) -> bool:
    """Whether the folder or one below it contains an image."""
    seen: set = set()
    folders = [folder]
    unused = Findings(folder)
    while folders:
        path = folders.pop()
        key = _key(path, os.path.realpath(path))
        if key in seen:
            continue
        seen.add(key)
        inner, files = entries(path, unused)
        if any(is_image(entry) for entry in files):
            return True
        folders += [entry.path for entry in inner]
    return False


def _key(path: str, real: str) -> tuple[int, int] | str:
    """A key that is equal for two names of one folder, bind mounts included."""
    try:
        status = os.stat(path)
    except OSError:
        return real
    return (status.st_dev, status.st_ino) if status.st_ino else real


def is_above(folder: str, other: str) -> bool:
    """Whether a resolved folder is `other` or contains it."""
    return other == folder or other.startswith(folder.rstrip(os.sep) + os.sep)
