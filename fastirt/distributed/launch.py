"""Run a command as one rank of a job, and end it in the right way when something is wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from typing import Callable, Iterator

from fastirt.distributed.failures import PeerLost, ReportedByMainRank, exit_now
from fastirt.distributed.ranks import Ranks
from fastirt.errors import user_message

log = logging.getLogger("fastirt")


def as_rank(command: str, work: Callable[[Ranks], int]) -> int:
    """The exit code of `work`.

    In a distributed job a failing rank prints one line and exits immediately; tearing down shared
    process groups could hang.
    """
    ranks = Ranks.from_environment()
    if not ranks.is_distributed:
        return work(ranks)
    if not ranks.is_main:  # rank 0 logs for all; the others only warn
        log.setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(
                logging.Formatter(f"%(asctime)s %(levelname)s rank {ranks.rank}: %(message)s", "%H:%M:%S")
            )
    # Else each rank starts a compiler process for every core of the node. Inductor reads it once.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(ranks.threads(32)))
    code, linger = 0, False
    try:
        code = work(ranks)
        if code == 0:
            ranks.close()
            return 0
    except ReportedByMainRank:
        code, linger = 2, True
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        error = ranks.as_peer_lost(error) or error
        code, linger, message = 2, isinstance(error, PeerLost), user_message(error)
        if message is None:
            code = 1
            traceback.print_exception(error)
        else:
            print(f"fastirt {command}: rank {ranks.rank}: error: {message}", file=sys.stderr)
    return exit_now(code, linger)


@contextlib.contextmanager
def only_main_warns(ranks: Ranks) -> Iterator[None]:
    """For work that all ranks do alike: only rank 0 logs its warnings."""
    level = log.level
    if not ranks.is_main:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
