"""The images in and below a class folder: each file and each folder once, and a word on everything that is left out."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Iterable

from fastirt.datasets.listing import inode_of
from fastirt.datasets.records import Image, counted, printable

# What Pillow opens without starting another program (EPS does) and on every system (WMF is for Windows). A list of our
# own: a catalogue must not change with Pillow's version, or packed stores and checkpoints would no longer fit it.
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
    """What a scan met beside the images that it returns."""

    root: str
    kinds: Counter = field(default_factory=Counter)  # extension -> files that are no images
    classes: dict[str, int] = field(default_factory=dict)  # class folder left out by its name -> files in it
    loose: list[str] = field(default_factory=list)  # images in no class folder
    repeated: list[str] = field(default_factory=list)  # links to folders that are read already
    foreign: Counter = field(default_factory=Counter)  # link -> images behind it that lie in another class's folder
    broken: list[str] = field(default_factory=list)  # links that lead nowhere, and what is neither file nor folder
    unreadable: list[str] = field(default_factory=list)  # folders that cannot be listed

    def warn(self) -> None:
        """One line for each kind of thing that is left out."""
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
                f"{counted(number, 'image', 'images')} behind {counted(len(links), 'link', 'links')}: {self._some(links)}"
            )
        if self.repeated:
            leading = counted(len(self.repeated), "link leads", "links lead")
            log(f"{self.root}: {leading} to a folder that is read already: not followed: {self._some(self.repeated)}")
        if self.broken:
            leading = counted(len(self.broken), "link or special file leads", "links or special files lead")
            log(f"{self.root}: {leading} to no file or folder, and are left out: {self._some(self.broken)}")
        if self.unreadable:
            folders = counted(len(self.unreadable), "folder", "folders")
            log(
                f"{self.root}: {folders} cannot be read (no permission, or the disk's error), and are left out: "
                + self._some(self.unreadable)
            )

    def _some(self, paths: list[str]) -> str:
        names = [printable(os.path.relpath(path, self.root)) for path in paths[:NAMED]]
        return ", ".join(names) + (", …" if len(paths) > NAMED else "")


class Owners:
    """Class folder -> class, with links resolved: whose is a file that a link leads to?"""

    def __init__(self, classes: Iterable[tuple[str, str]]) -> None:
        """`classes`: (absolute class folder, class) of all splits."""
        self._classes: dict[str, str] = {}
        linked: dict[str, set[str]] = {}
        for folder, label in classes:
            if os.path.islink(folder):
                linked.setdefault(os.path.realpath(folder), set()).add(label)
            else:
                self._classes[os.path.realpath(folder)] = label
        # A class folder that is a link owns what it leads to, unless that is another class's or two classes share it.
        mine = {real: labels.pop() for real, labels in linked.items() if len(labels) == 1 and self.of(real) is None}
        self._classes.update(mine)

    def of(self, real: str) -> str | None:
        """The class whose folder holds the real folder; None where that is no class folder."""
        while real not in self._classes:
            parent = os.path.dirname(real)
            if parent == real:
                return None
            real = parent
        return self._classes[real]


def entries(folder: str, found: Findings) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """(folders, files) in a folder, each sorted by name; hidden ones and those of operating systems are left out."""
    folders: list[os.DirEntry] = []
    files: list[os.DirEntry] = []
    try:
        with os.scandir(folder) as listing:
            every = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        found.unreadable.append(folder)
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
                found.broken.append(entry.path)
        except OSError:  # a link to itself, or a target without permission
            found.broken.append(entry.path)
    return folders, files


def is_image(entry: os.DirEntry) -> bool:
    """By the extension; a name without one, such as IMG.2019, is judged by the file's first bytes."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if _EXTENSION.fullmatch(suffix):
        return suffix in EXTENSIONS
    try:
        with open(entry.path, "rb") as file:
            return _FIRST_BYTES.match(file.read(16)) is not None
    except OSError:
        return False


def class_images(folder: str, label: str, owners: Owners, found: Findings) -> list[Image]:
    """All images in and below a class folder, sorted by path. Links are followed, each real folder is read once."""
    images: list[Image] = []
    top = os.path.realpath(folder)
    seen = {_key(folder, top)}
    folders = [(folder, top, folder if os.path.islink(folder) else "")]  # (path, real path, link that led there)
    links: list[tuple[str, str, str]] = []  # read last: what is in the class folder itself keeps its own path
    while folders or links:
        if folders:
            path, real, link = folders.pop()
        else:
            path, real, link = links.pop(0)
            key = _key(path, real)
            if key in seen or is_above(real, top):
                found.repeated.append(path)
                continue
            seen.add(key)
        owner = owners.of(real) if link else label
        inner, files = entries(path, found)
        for image in _images(files, label, real, owners, found):
            if owner in (None, label):
                images.append(image)
            else:
                found.foreign[link] += 1
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


def _images(files: list[os.DirEntry], label: str, real: str, owners: Owners, found: Findings) -> Iterable[Image]:
    """The images among the files of one real folder; those that are links into another class's folder are left out."""
    for entry in files:
        if not is_image(entry):
            suffix = os.path.splitext(entry.name)[1].lower()
            found.kinds[suffix if _EXTENSION.fullmatch(suffix) else "without extension"] += 1
        elif not entry.is_symlink():
            yield Image(entry.path, label, os.path.join(real, entry.name), entry.inode())
        else:
            target = os.path.realpath(entry.path)
            if owners.of(os.path.dirname(target)) in (None, label):
                yield Image(entry.path, label, target, inode_of(entry.path))
            else:
                found.foreign[entry.path] += 1


def holds_images(folder: str) -> bool:
    """Whether there is an image in or below a folder."""
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
    """What is equal for two names of one folder: bind mounts have no link that could be resolved."""
    try:
        status = os.stat(path)
    except OSError:
        return real
    return (status.st_dev, status.st_ino) if status.st_ino else real


def is_above(folder: str, other: str) -> bool:
    """Whether a real folder is another one, or holds it."""
    return other == folder or other.startswith(folder.rstrip(os.sep) + os.sep)
