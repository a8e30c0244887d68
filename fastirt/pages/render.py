"""From a template and values to one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from fastirt import __version__
from fastirt.atomic import atomic_write
from fastirt.datasets.records import printable
from fastirt.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"


def check_page(path: Path) -> None:
    """Raises UserError if the page cannot be written, before anything is computed for it."""
    if os.path.isdir(path):
        raise UserError(f"--html {path}: is a folder: name a file")
    if not os.path.isdir(path.parent):
        raise UserError(f"--html {path}: there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--html {path}: cannot be written (permission denied): choose another file")


def write_page(path: Path, template: str, **values: Any) -> int:
    """Render a template of this package to a file, atomically; returns the size in bytes.

    Every value is HTML-escaped, and what is no printable text (line ends, the surrogates of file
    names that are not UTF-8) becomes an escape sequence.
    Raises UserError: the file cannot be written.
    """
    values |= {"version": __version__, "date": datetime.date.today().isoformat()}
    page = _environment().get_template(template).render(values).encode("utf-8")
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(page)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror or error})") from error
    return len(page)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(value: Any) -> Any:
    is_text = isinstance(value, (str, os.PathLike)) and not isinstance(value, markupsafe.Markup)
    return printable(os.fspath(value)) if is_text else value
