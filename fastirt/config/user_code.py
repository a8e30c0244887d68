"""Functions of a user, named on the command line: FILE.py:NAME or package.module:NAME.

A run stores the name as text, FILE.py with its whole path; what shapes training also has the first
digits of the SHA-256 of its file: FILE.py:NAME@0123456789abcdef.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fastirt.errors import UserError, first_line

DIGITS = 16  # of the digest


class Named(NamedTuple):
    """The parts of such a text."""

    place: str  # FILE.py or package.module
    name: str
    digest: str  # "" where none was noted

    @property
    def is_file(self) -> bool:
        return self.place.endswith(".py")


def is_user_code(text: str) -> bool:
    """Whether an option names a user's function, and not one of its choices."""
    return ":" in text


def parse(text: str) -> Named:
    place, _, name = text.rpartition(":")
    name, _, digest = name.partition("@")
    return Named(place, name, digest)


def short_name(text: str) -> str:
    """NAME of a user's function, any other text as it is: for folders and messages."""
    return parse(text).name if is_user_code(text) else text


def portable(text: str | None) -> str | None:
    """The text without the file's folder: equal for one file in two places."""
    if text is None or not is_user_code(text):
        return text
    named = parse(text)
    return _joined(named._replace(place=os.path.basename(named.place) if named.is_file else named.place))


def absolute(text: str) -> str:
    """The text with the whole path of its file."""
    named = parse(text)
    if not (is_user_code(text) and named.is_file):
        return text
    return _joined(named._replace(place=os.path.abspath(os.path.expanduser(named.place))))


def with_digest(flag: str, text: str) -> str:
    """`absolute`, with the digest of the file as it is now. Raises UserError without a file."""
    named = _well_formed(flag, text)
    file = Path(named.place) if named.is_file else Path(str(_module(flag, text, named).__file__))
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]
    except OSError as error:
        raise UserError(f"{flag} {text}: {file}: {(error.strerror or 'unreadable').lower()}") from None
    return _joined(named._replace(digest=digest))


def load_object(flag: str, text: str) -> Any:
    """The function, class or object that `text` names.

    flag: the option, for messages. Raises UserError where there is no such file, module or name,
    and where the file raises as it is imported.
    """
    named = _well_formed(flag, text)
    module = _module(flag, text, named)
    if not hasattr(module, named.name):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{flag} {text}: {named.place} has no {named.name}; it has {', '.join(own) or 'no functions'}")
    found = getattr(module, named.name)
    if isinstance(found, ModuleType):
        raise UserError(f"{flag} {text}: is a module: name a function in it")
    return found


def user_error(flag: str, text: str, error: BaseException) -> UserError:
    """What a user's function raised, as one line with the file and line that raised it."""
    if isinstance(error, UserError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    file = parse(absolute(text)).place
    own = [frame for frame in frames if frame.filename == file] or frames[-1:]
    place = f" at {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return UserError(f"{flag} {short_name(text)}: {type(error).__name__}: {first_line(error)}{place}")


def _well_formed(flag: str, text: str) -> Named:
    """The parts of a text that may name something. Raises UserError for another one."""
    named = parse(absolute(text))
    if not (named.place and named.name.isidentifier()):
        raise UserError(f"{flag} {text}: name a function as FILE.py:NAME or package.module:NAME")
    return named


def _module(flag: str, text: str, named: Named) -> ModuleType:
    # A stored run may name the function: those of Python itself could do anything with an argument.
    if _is_pythons_own(named):
        raise UserError(f"{flag} {text}: is a part of Python: name a function in a file of yours")
    try:
        return _of_file(Path(named.place)) if named.is_file else importlib.import_module(named.place)
    except FileNotFoundError as error:
        if error.filename != named.place:
            raise user_error(flag, text, error) from error
        raise UserError(f"{flag} {text}: {named.place}: no such file") from None
    except ModuleNotFoundError as error:
        if named.is_file or error.name is None or not named.place.startswith(error.name):
            raise user_error(flag, text, error) from error
        raise UserError(
            f"{flag} {text}: no module {error.name}: name a file, FILE.py:NAME, or set PYTHONPATH"
        ) from None
    except Exception as error:
        raise user_error(flag, text, error) from error


def _of_file(file: Path) -> ModuleType:
    """The module of a file, imported once; it may import its neighbors."""
    key = f"fastirt_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, file)
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _is_pythons_own(named: Named) -> bool:
    """Whether a module is of Python's standard library."""
    if not named.is_file:
        return named.place.partition(".")[0] in sys.stdlib_module_names
    paths, real = sysconfig.get_paths(), os.path.realpath(named.place)
    stdlib, installed = (
        any(real.startswith(os.path.realpath(paths[name]) + os.sep) for name in names)
        for names in (("stdlib", "platstdlib"), ("purelib", "platlib"))
    )
    return stdlib and not installed


def _joined(named: Named) -> str:
    return f"{named.place}:{named.name}" + (f"@{named.digest}" if named.digest else "")
