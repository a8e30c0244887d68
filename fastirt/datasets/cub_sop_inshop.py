"""CUB-200-2011, Stanford Online Products and In-Shop, in their published layouts."""

from __future__ import annotations

import logging
from pathlib import Path

from fastirt.datasets.folder_scan import Findings, Owners, class_images, entries
from fastirt.datasets.listing import read_rows, require_files, require_folder
from fastirt.datasets.records import Catalog, assemble
from fastirt.errors import UserError

# Images per split, from the data sets' authors and the paper.
COUNTS = {
    "cub200": {"train": 5864, "test": 5924},
    "sop": {"train": 59551, "test": 60502},
    "inshop": {"train": 25882, "query": 14218, "gallery": 12612},
}
SOP_HEADER = ["image_id", "class_id", "super_class_id", "path"]
INSHOP_HEADER = ["image_name", "item_id", "evaluation_status"]


def load_cub200(data_path: str) -> Catalog:
    """CUB_200_2011/images/001.Black_footed_Albatross/….jpg; the first 100 sorted classes train.

    If images.txt exists beside images/, every image listed in it must exist. The catalogue is
    sorted by class and name with or without it.
    """
    root = _root(data_path, "CUB_200_2011", "pass --data-path the folder CUB_200_2011, or another --dataset")
    folder = require_folder(root / "images", "unpack CUB_200_2011.tgz and pass --data-path its folder CUB_200_2011")
    list_file = root / "images.txt"
    if list_file.exists():
        rows = _columns(list_file, read_rows(list_file, "unpack the data set again"), 1, ["image_id", "path"])
        names = [fields[1] for _, fields in rows]
        for (row, _), name in zip(rows, names):
            if "/" not in name:
                raise UserError(f"{list_file}: row {row}: '{name}' is in no class folder: unpack the data set again")
        paths = [str(folder / name) for name in names]
        require_files(list_file, folder, [row for row, _ in rows], names, paths)
        records = sorted(((path, name.split("/")[0]) for path, name in zip(paths, names)), key=lambda r: (r[1], r[0]))
    else:
        findings = Findings(str(root))
        folders = [(entry.path, entry.name) for entry in entries(str(folder), findings)[0]]
        owners = Owners(folders)
        records = [image[:2] for path, name in folders for image in class_images(path, name, owners, findings)]
        findings.warn()
    classes = sorted({record[1] for record in records})
    if len(classes) < 2:
        raise UserError(f"{folder}: {len(classes)} class folders with images instead of 200: unpack it again")
    training = set(classes[: len(classes) // 2])
    return _counted(
        assemble(
            "cub200",
            str(root),
            {"train": [r for r in records if r[1] in training], "test": [r for r in records if r[1] not in training]},
        )
    )


def load_sop(data_path: str) -> Catalog:
    """Ebay_train.txt and Ebay_test.txt: rows `image_id class_id super_class_id path`.

    Paths are relative to the lists' folder.
    """
    root = _root(data_path, "Stanford_Online_Products", "pass --data-path the folder Stanford_Online_Products")
    records = {}
    for split in ("train", "test"):
        list_file = root / f"Ebay_{split}.txt"
        lines = read_rows(list_file, "unpack Stanford_Online_Products.zip and pass --data-path its folder")
        if lines[0].split() != SOP_HEADER:
            raise UserError(
                f"{list_file}: row 1: '{lines[0][:80]}' is not the header '{' '.join(SOP_HEADER)}': "
                "use the published list"
            )
        rows = _columns(list_file, lines, 2, SOP_HEADER)
        names = [fields[3] for _, fields in rows]
        paths = [str(root / name) for name in names]
        require_files(list_file, root, [row for row, _ in rows], names, paths)
        records[split] = [(path, fields[1]) for path, (_, fields) in zip(paths, rows)]
        _not_empty(records[split], list_file, split)
    return _counted(assemble("sop", str(root), records))


def load_inshop(data_path: str) -> Catalog:
    """list_eval_partition.txt: rows `img/….jpg id_00000001 train|query|gallery`.

    The list is in the folder or its Eval/, the images are under img/ or Img/img/.
    """
    root = require_folder(data_path, "pass --data-path the folder with list_eval_partition.txt and img/")
    list_file = next(
        (f for f in (root / "list_eval_partition.txt", root / "Eval" / "list_eval_partition.txt") if f.exists()),
        root / "list_eval_partition.txt",
    )
    lines = read_rows(list_file, "put it there or in Eval/")
    base = next((f for f in (root, root / "Img") if (f / "img").is_dir()), None)
    if base is None:
        raise UserError(f"{root}: neither img/ nor Img/img/ exists: unpack img.zip in {root} or its Img/")
    start = 1 + next((i for i, line in enumerate(lines[:2]) if line.split() == INSHOP_HEADER), -1)
    if start == 0:
        raise UserError(
            f"{list_file}: no header '{' '.join(INSHOP_HEADER)}' in its first two rows: use the published list"
        )
    rows = _columns(list_file, lines, start + 1, INSHOP_HEADER)
    for row, fields in rows:
        if fields[2] not in COUNTS["inshop"]:
            raise UserError(f"{list_file}: row {row}: '{fields[2]}' is not train, query or gallery")
    names = [fields[0] for _, fields in rows]
    paths = [str(base / name) for name in names]
    require_files(list_file, base, [row for row, _ in rows], names, paths)
    records: dict[str, list[tuple[str, str]]] = {split: [] for split in COUNTS["inshop"]}
    for path, (_, (_, item, split)) in zip(paths, rows):
        records[split].append((path, item))
    for split in records:
        _not_empty(records[split], list_file, split)
    return _counted(assemble("inshop", str(root), records))


def _root(data_path: str, inner: str, remedy: str) -> Path:
    """The data set's folder, given that folder or its parent."""
    root = require_folder(data_path, remedy)
    return root / inner if (root / inner).is_dir() else root


def _columns(list_file: Path, lines: list[str], first: int, header: list[str]) -> list[tuple[int, list[str]]]:
    """(row, fields) of each line that is not blank, from row `first`.

    A last field called path may contain spaces. Raises UserError for a wrong number of fields.
    """
    splits = len(header) - 1 if header[-1] == "path" else -1
    rows = []
    for row, line in enumerate(lines[first - 1 :], first):
        fields = line.split(None, splits)
        if fields and len(fields) != len(header):
            raise UserError(
                f"{list_file}: row {row}: '{line[:80]}' is not '{' '.join(header)}': use the published list"
            )
        if fields:
            fields[-1] = fields[-1].rstrip()
            rows.append((row, fields))
    return rows


def _not_empty(records: list, list_file: Path, split: str) -> None:
    if not records:
        raise UserError(f"{list_file}: no images for the split {split}: use the published list")


def _counted(catalog: Catalog) -> Catalog:
    """The catalogue; warns if a split's number of images differs from the published one."""
    for split in catalog.splits():
        published = COUNTS[catalog.dataset][split.name]
        if len(split) != published:
            logging.getLogger("fastirt").warning(
                f"{catalog.dataset}: {len(split):,} {split.name} images under {catalog.root}, {published:,} are "
                "published: do not compare the results with published ones"
            )
    return catalog
