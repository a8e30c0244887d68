"""User-facing errors: one line, no traceback."""

from __future__ import annotations

import errno
from typing import Optional

OF_THE_MACHINE = {  # what the operating system may refuse in the middle of a run
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE,
}  # fmt: skip


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def user_message(error: BaseException) -> Optional[str]:
    """What to tell a user of an error that is not the program's: theirs, the disk's, or the GPU's memory. None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported for commands that need no torch
        return (
            "the GPU is out of memory: lower --batch-size or --eval-batch-size, or pass --cache host "
            f"({first_line(error)})"
        )
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        return f"{error.filename or 'a file'}: {error.strerror}: fix that, then resume from the last checkpoint with --resume"
    return None


def first_line(error: BaseException) -> str:
    """The first line of its message that says anything, or its kind."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:200] for line in lines if line), type(error).__name__)
