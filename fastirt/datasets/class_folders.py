"""The user's own images in class folders, and what `fastirt demo` wrote."""

from __future__ import annotations

import json
import logging
import os
from typing import NamedTuple

from fastirt.datasets.folder_scan import Findings, Owners, class_images, entries, holds_images, is_above, is_image
from fastirt.datasets.listing import require_folder
from fastirt.datasets.records import Image, Listed, printable
from fastirt.datasets.splits import choose, family, split_name
from fastirt.errors import UserError

LAYOUT = "train/ beside test/, or train/, query/ and gallery/, with class folders in each"
MAX_WRAPPERS = 4  # folders that hold one folder each, around the class folders


class Folder(NamedTuple):
    """A candidate for a class folder."""

    name: str
    path: str
    has_images: bool  # of its own, not in its sub-folders
    inner: tuple[str, ...]  # names of its sub-folders that hold images; not looked for where it has its own


def load_folder(
    data_path: str, eval_split: str = "test", training: bool | None = True, dataset: str = "folder"
) -> Listed:
    """One folder per class; the first half of the sorted classes trains. Or train/ beside test/; or train/, query/,
    gallery/, with class folders in each. Sub-folders of a class folder belong to the class."""
    root = str(require_folder(data_path, "give --data-path the folder that holds one folder per class"))
    found = Findings(root)
    try:
        top, folders = _unwrapped(root, found)
        parts = _split_folders(top, folders)
        if parts:
            return Listed(dataset, root, _splits(top, folders, parts, eval_split, training, found))
        _check_layout(top, folders)
        return Listed(dataset, root, _halves(top, folders, found))
    finally:
        found.warn()


def load_demo(data_path: str, eval_split: str = "test", training: bool | None = True) -> Listed:
    """What `fastirt demo OUT` wrote: demo.json beside train/ and test/."""
    remedy = "make the demo set with `fastirt demo OUT` and give --data-path OUT"
    root = require_folder(data_path, remedy)
    try:
        known = isinstance(json.loads((root / "demo.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        known = False
    if not known:
        raise UserError(f"{root / 'demo.json'}: missing or unreadable: {remedy}, or pass --dataset folder")
    for part in ("train", "test"):
        require_folder(root / part, remedy)
    return load_folder(str(root), eval_split, training, "demo")


def _unwrapped(top: str, found: Findings, splits: bool = True) -> tuple[str, list[Folder]]:
    """The folder that holds the class folders (or the `splits`), and what it holds: itself, or the only one in it."""
    for _ in range(MAX_WRAPPERS):
        folders = _candidates(top, found)
        full = [folder for folder in folders if folder.has_images or folder.inner]
        if len(full) != 1 or full[0].has_images or (splits and any(split_name(f.name) for f in folders)):
            break
        top = full[0].path
        logging.getLogger("fastirt").warning(f"{found.root}: the class folders are read from {printable(top)}")
    return top, folders


def _candidates(top: str, found: Findings) -> list[Folder]:
    """The folders in a folder; a class folder called __…__ and images beside the folders are noted as left out."""
    real = os.path.realpath(top)
    listed, files = entries(top, found)
    found.loose += [entry.path for entry in files if is_image(entry)]
    folders = []
    for entry in listed:
        if entry.is_symlink() and is_above(os.path.realpath(entry.path), real):
            found.repeated.append(entry.path)
        elif entry.name.startswith("__"):
            unused = Findings(top)
            images = class_images(entry.path, entry.name, Owners([]), unused)
            found.classes[entry.name] = len(images) + sum(unused.kinds.values())
        else:
            folders.append(_folder(entry))
    return folders


def _folder(entry: os.DirEntry) -> Folder:
    inner, files = entries(entry.path, Findings(entry.path))
    if any(is_image(file) for file in files):
        return Folder(entry.name, entry.path, True, tuple(i.name for i in inner) if split_name(entry.name) else ())
    return Folder(entry.name, entry.path, False, tuple(i.name for i in inner if holds_images(i.path)))


def _split_folders(top: str, folders: list[Folder]) -> dict[str, Folder]:
    """Split -> its folder; empty where the folders are classes. Raises UserError where that cannot be told."""
    parts: dict[str, Folder] = {}
    for folder in folders:
        split = split_name(folder.name)
        # A folder called train that holds images but no folders is a class: a set of toys has one.
        if split is None or not (folder.inner or _is_empty_split(folder)):
            continue
        if split in parts:
            raise UserError(
                f"{top}: {printable(parts[split].name)}/ and {printable(folder.name)}/ are both the split {split}: "
                "rename or move one of them"
            )
        parts[split] = folder
    beside = [folder.name for folder in folders if folder.has_images and folder not in parts.values()]
    if len(parts) == 1 and len(beside) > 1:
        (split, folder), lacking = next(iter(parts.items())), "train" if "train" not in parts else "test"
        raise UserError(
            f"{top}: {printable(folder.name)}/ holds class folders as the split {split} does, but {_some(beside)} "
            f"beside it hold images as classes do: the split {lacking} is missing, or {printable(folder.name)}/ is a "
            "class: rename it then"
        )
    return parts


def _is_empty_split(folder: Folder) -> bool:
    """A split without images is an error later; a folder called index or database may be something else."""
    if folder.has_images or folder.name.casefold() in ("index", "database"):
        return False
    return bool(entries(folder.path, Findings(folder.path))[0])


def _splits(
    top: str, folders: list[Folder], parts: dict[str, Folder], eval_split: str, training: bool | None, found: Findings
) -> dict[str, list[Image]]:
    """The images of the splits that are used."""
    chosen = choose([(family(split), split) for split in parts], eval_split, training, top)
    ignored = [folder.name for folder in folders if folder not in parts.values()]
    if ignored:
        logging.getLogger("fastirt").warning(
            f"{top}: not read beside {', '.join(f'{printable(f.name)}/' for f in parts.values())}: {_some(ignored)}"
        )
    classes: dict[str, list[Folder]] = {}
    for split, folder in parts.items():
        if family(split) in ("train", chosen):
            inner, classes[split] = _unwrapped(folder.path, found, splits=False)
            _check_layout(inner, classes[split])
    owners = Owners((folder.path, folder.name) for split in classes for folder in classes[split])
    return {split: _images(parts[split].path, inner, owners, found) for split, inner in classes.items()}


def _halves(top: str, folders: list[Folder], found: Findings) -> dict[str, list[Image]]:
    """The first half of the sorted classes trains, the other half is the test split."""
    images = _images(top, folders, Owners((folder.path, folder.name) for folder in folders), found)
    classes = list(dict.fromkeys(image.label for image in images))
    if len(classes) < 2:
        raise UserError(
            f"{top}: one class only ('{printable(classes[0])}'), half of the classes train: at least 2 in each half "
            f"are needed, or {LAYOUT}"
        )
    training = set(classes[: len(classes) // 2])
    logging.getLogger("fastirt").info(
        f"{found.root}: the first {len(training):,} of {len(classes):,} sorted classes train, the others are the test split"
    )
    return {
        "train": [image for image in images if image.label in training],
        "test": [image for image in images if image.label not in training],
    }


def _check_layout(top: str, folders: list[Folder]) -> None:
    """Raises UserError where the folders are no classes but hold the class folders: images/ beside segmentations/."""
    outer = [folder for folder in folders if len(folder.inner) > 1 and not folder.has_images]
    direct = [folder for folder in folders if folder.has_images]
    if not outer:
        return
    first = outer[0]
    inner = (
        f"{printable(first.name)}/ holds {len(first.inner):,} folders of images, such as {printable(first.inner[0])}/"
    )
    if not direct or len(outer) >= max(2, len(direct)):
        raise UserError(
            f"{top}: this layout is not understood: {_some([f.name for f in outer])} hold no images themselves, but "
            f"folders of images ({inner}): give --data-path {printable(first.path)} if those are the classes; or {LAYOUT}; or "
            "list the images in a CSV file (--dataset csv)"
        )
    logging.getLogger("fastirt").warning(
        f"{top}: {_some([f.name for f in outer])}: no images there but in sub-folders, which are read as one class "
        f"({inner}): if those are the classes, give --data-path {printable(first.path)}"
    )


def _images(where: str, folders: list[Folder], owners: Owners, found: Findings) -> list[Image]:
    """All images in the class folders; raises UserError where there is none at all."""
    images, empty = [], []
    for folder in folders:
        behind_links = sum(found.foreign.values())
        inside = class_images(folder.path, folder.name, owners, found)
        images += inside
        if not inside and sum(found.foreign.values()) == behind_links:
            empty.append(folder.name)
    if not images:
        raise UserError(f"{where}: no images in class folders: {where}/CLASS/image.jpg is what is read")
    if empty:
        logging.getLogger("fastirt").warning(
            f"{where}: {len(empty)} class folders hold no images and are left out: {_some(empty)}"
        )
    return images


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
