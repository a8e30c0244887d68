"""A generation of a gallery, opened: its manifest and store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from fastirt.errors import UserError
from fastirt.gallery.bundle import check_files, read_manifest
from fastirt.gallery.encode import load_model
from fastirt.gallery.stores import open_store
from fastirt.gallery.stores.base import Store

if TYPE_CHECKING:
    from fastirt.inference.model import Model


class Generation(NamedTuple):
    """Stays as it is while later generations are written."""

    manifest: dict[str, Any]
    store: Store


def open_generation(folder: Path, device: str, verify: bool) -> Generation:
    """Open the newest one. verify: compare the digests of all files.

    Raises UserError for a folder that holds no whole gallery.
    """
    manifest = read_manifest(folder)
    while True:
        try:
            check_files(folder, manifest["files"], verify)
            return Generation(manifest, open_store(folder, manifest["store"], int(manifest["dim"]), device))
        except FileNotFoundError as error:
            before, manifest = manifest, read_manifest(folder)
            # else a writer replaced the files between the reads: take its generation
            if manifest["digest"] == before["digest"]:
                raise UserError(f"{folder}: lacks {Path(error.filename or '').name}: copy the whole folder again")


def search_device(device: Optional[str]) -> str:
    """device, or a GPU if there is one. Raises UserError for a device that is not there."""
    from fastirt.distributed.device import choose_device

    return str(choose_device(device))


def check_model(folder: Path, manifest: dict[str, Any], model: Model) -> None:
    """Raises UserError if the gallery's vectors are of another model or preprocessing."""
    expected = manifest["model"] and manifest["model"]["digest"]
    if expected != model.digest:
        raise UserError(
            f"{folder}: its vectors are of a model with other weights or preprocessing (digest "
            f"{str(expected)[:12]}, this model's {model.digest[:12]}): leave the model out, or run fastirt index again"
        )


def load_own_model(folder: Path, manifest: dict[str, Any], device: str) -> Model:
    """The model in the gallery's folder. Raises UserError if there is none, or another."""
    if manifest["model"] is None:
        raise UserError(f"{folder}: made of vectors without a model: search it by vectors (Gallery.search_vectors)")
    file = folder / manifest["model"]["file"]
    if not file.is_file():
        raise UserError(f"{file}: gone, the gallery was rebuilt: open it again")
    model = load_model(file, device)
    check_model(folder, manifest, model)
    return model
