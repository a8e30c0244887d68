"""User-facing errors: one line, no traceback."""

from __future__ import annotations

import errno
from typing import Optional

# Errors of disk, permissions and limits that may occur in the middle of a run.
OS_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
}


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def user_message(error: BaseException) -> Optional[str]:
    """One line about an error of the user, the disk or GPU memory; None for the program's own."""
    if isinstance(error, UserError):
        return str(error)
    # torch's error, compared by name because some commands do not import torch.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU is out of memory: lower --batch-size or --eval-batch-size, or pass --cache host "
            f"({first_line(error)})"
        )
    if isinstance(error, OSError) and error.errno in OS_ERRNOS:
        return (
            f"{error.filename or 'a file'}: {error.strerror}: "
            "fix that, then resume from the last checkpoint with --resume"
        )
    return None


def first_line(error: BaseException) -> str:
    """The first line of the message that is not blank, at most 200 characters, or the type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:200] for line in lines if line), type(error).__name__)
