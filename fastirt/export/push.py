"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from fastirt.errors import UserError, first_line


def check_name(name: str) -> None:
    """Raises UserError unless `name` is USER/NAME as the Hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"--push {name}: not a name on the Hub: write USER/NAME, in letters, digits, '-', '_' and '.'")


def upload(folder: Path, name: str) -> str:
    """Upload all files of a folder; the repository is made if it is new. Returns its address.

    Raises UserError without network or permission; `folder` stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    message = "Export by fastirt"
    try:
        try:
            api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
        except RepositoryNotFoundError:
            api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
    except Exception as error:  # network, authentication and the hub raise many unrelated types
        raise UserError(
            f"--push {name}: not uploaded ({type(error).__name__}: {first_line(error)}); {folder} is complete: "
            f"`hf auth login`, then `hf upload {name} {folder}`"
        ) from error
    return f"https://huggingface.co/{name}"
