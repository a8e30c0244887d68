"""A user's images in class folders, and the demo set of `fastirt demo`."""

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
MAX_WRAPPERS = 4  # nested folders above the class folders that hold a single folder each


class Folder(NamedTuple):
    """A candidate class folder."""

    name: str
    path: str
    has_images: bool  # directly, not in sub-folders
    # Names of sub-folders that hold images; empty if `has_images`, except for a split's name.
    inner: tuple[str, ...]


def load_folder(
    data_path: str, eval_split: str = "test", training: bool | None = True, dataset: str = "folder"
) -> Listed:
    """List a folder with one sub-folder per class, or with splits that hold class folders.

    Without splits, the first half of the sorted classes is the training split. Splits are train/
    and test/, or train/, query/ and gallery/. Deeper sub-folders belong to their class folder.
    """
    root = str(require_folder(data_path, "pass --data-path the folder that holds one folder per class"))
    findings = Findings(root)
    try:
        top, folders = _unwrapped(root, findings)
        parts = _split_folders(top, folders)
        if parts:
            return Listed(dataset, root, _splits(top, folders, parts, eval_split, training, findings))
        _check_layout(top, folders)
        return Listed(dataset, root, _halves(top, folders, findings))
    finally:
        findings.warn()


def load_demo(data_path: str, eval_split: str = "test", training: bool | None = True) -> Listed:
    """List the demo set of `fastirt demo OUT`: demo.json beside train/ and test/."""
    remedy = "make the demo set with `fastirt demo OUT` and pass --data-path OUT"
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


def _unwrapped(top: str, findings: Findings, splits: bool = True) -> tuple[str, list[Folder]]:
    """(folder of the class folders or splits, its candidates), below wrappers around it."""
    for _ in range(MAX_WRAPPERS):
        folders = _candidates(top, findings)
        full = [folder for folder in folders if folder.has_images or folder.inner]
        if len(full) != 1 or full[0].has_images or (splits and any(split_name(f.name) for f in folders)):
            break
        top = full[0].path
        logging.getLogger("fastirt").warning(f"{findings.root}: the class folders are read from {printable(top)}")
    return top, folders


def _candidates(top: str, findings: Findings) -> list[Folder]:
    """The candidate class folders in `top`; `findings` gets skipped images and `__…` folders."""
    real = os.path.realpath(top)
    listed, files = entries(top, findings)
    findings.loose += [entry.path for entry in files if is_image(entry)]
    folders = []
    for entry in listed:
        if entry.is_symlink() and is_above(os.path.realpath(entry.path), real):
            findings.repeated.append(entry.path)
        elif entry.name.startswith("__"):
            unused = Findings(top)
            images = class_images(entry.path, entry.name, Owners([]), unused)
            findings.classes[entry.name] = len(images) + sum(unused.kinds.values())
        else:
            folders.append(_folder(entry))
    return folders


def _folder(entry: os.DirEntry) -> Folder:
    inner, files = entries(entry.path, Findings(entry.path))
    if any(is_image(file) for file in files):
        return Folder(entry.name, entry.path, True, tuple(i.name for i in inner) if split_name(entry.name) else ())
    return Folder(entry.name, entry.path, False, tuple(i.name for i in inner if holds_images(i.path)))


def _split_folders(top: str, folders: list[Folder]) -> dict[str, Folder]:
    """Split -> its folder; empty if the folders are classes. Raises UserError if ambiguous."""
    parts: dict[str, Folder] = {}
    for folder in folders:
        split = split_name(folder.name)
        # A folder called train with images but no sub-folders is a class, such as a toy train.
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
            f"{top}: {printable(folder.name)}/ holds folders like the split {split}, but {_some(beside)} beside it "
            f"hold images like classes: the split {lacking} is missing, or {printable(folder.name)}/ is a class: "
            "add the split or rename the class"
        )
    return parts


def _is_empty_split(folder: Folder) -> bool:
    """Whether a folder named after a split holds folders without images, an error reported later.

    A folder called index or database may be no split at all.
    """
    if folder.has_images or folder.name.casefold() in ("index", "database"):
        return False
    return bool(entries(folder.path, Findings(folder.path))[0])


def _splits(
    top: str,
    folders: list[Folder],
    parts: dict[str, Folder],
    eval_split: str,
    training: bool | None,
    findings: Findings,
) -> dict[str, list[Image]]:
    """The images of the training split and of the chosen evaluation splits."""
    chosen = choose([(family(split), split) for split in parts], eval_split, training, top)
    ignored = [folder.name for folder in folders if folder not in parts.values()]
    if ignored:
        logging.getLogger("fastirt").warning(
            f"{top}: not read beside {', '.join(f'{printable(f.name)}/' for f in parts.values())}: {_some(ignored)}"
        )
    classes: dict[str, list[Folder]] = {}
    for split, folder in parts.items():
        if family(split) in ("train", chosen):
            inner, classes[split] = _unwrapped(folder.path, findings, splits=False)
            _check_layout(inner, classes[split])
    owners = Owners((folder.path, folder.name) for split in classes for folder in classes[split])
    return {split: _images(parts[split].path, inner, owners, findings) for split, inner in classes.items()}


def _halves(top: str, folders: list[Folder], findings: Findings) -> dict[str, list[Image]]:
    """Training and test split: first and second half of the sorted classes."""
    images = _images(top, folders, Owners((folder.path, folder.name) for folder in folders), findings)
    classes = list(dict.fromkeys(image.label for image in images))
    if len(classes) < 2:
        raise UserError(
            f"{top}: one class only ('{printable(classes[0])}'): the classes are split into a training and a test "
            f"half, which need at least 2 each; or use {LAYOUT}"
        )
    training = set(classes[: len(classes) // 2])
    logging.getLogger("fastirt").info(
        f"{findings.root}: the first {len(training):,} of {len(classes):,} sorted classes are the training split, "
        "the others the test split"
    )
    return {
        "train": [image for image in images if image.label in training],
        "test": [image for image in images if image.label not in training],
    }


def _check_layout(top: str, folders: list[Folder]) -> None:
    """Raises UserError if class folders are one level deeper: images/ beside segmentations/."""
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
            f"{top}: this layout is not understood: {_some([f.name for f in outer])} hold no images but folders of "
            f"images ({inner}): pass --data-path {printable(first.path)} if those are the classes; or use {LAYOUT}; "
            "or list the images in a CSV file (--dataset csv)"
        )
    logging.getLogger("fastirt").warning(
        f"{top}: {_some([f.name for f in outer])}: images only in sub-folders, which are read as one class "
        f"({inner}): if those are the classes, pass --data-path {printable(first.path)}"
    )


def _images(place: str, folders: list[Folder], owners: Owners, findings: Findings) -> list[Image]:
    """All images in the class folders; raises UserError if there are none."""
    images, empty = [], []
    for folder in folders:
        behind_links = sum(findings.foreign.values())
        inside = class_images(folder.path, folder.name, owners, findings)
        images += inside
        if not inside and sum(findings.foreign.values()) == behind_links:
            empty.append(folder.name)
    if not images:
        raise UserError(f"{place}: no images in class folders: put them at {place}/CLASS/image.jpg")
    if empty:
        logging.getLogger("fastirt").warning(
            f"{place}: {len(empty)} class folders hold no images and are skipped: {_some(empty)}"
        )
    return images


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
