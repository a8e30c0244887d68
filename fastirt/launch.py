"""Runs a command as one rank of a job: how it starts, and how it ends when something is wrong."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Callable

from fastirt.distributed import PeerGone, Ranks, SaidElsewhere
from fastirt.errors import UserError


def as_rank(command: str, work: Callable[[Ranks], int]) -> int:
    """The exit code of `work`. One of many ranks that fails says so in one line and ends at once: waiting for the others, or
    taking down what they still use, could hang."""
    ranks = Ranks.from_environment()
    if not ranks.many:
        return work(ranks)
    if not ranks.first:  # rank 0 speaks for all; the others only warn
        logging.getLogger("fastirt").setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(
                logging.Formatter(f"%(asctime)s %(levelname)s rank {ranks.rank}: %(message)s", "%H:%M:%S")
            )
    linger = False
    try:
        code = work(ranks)
        if code == 0:
            ranks.close()
            return 0
    except SaidElsewhere:
        code = 2
    except UserError as error:
        code, linger = 2, isinstance(error, PeerGone)
        print(f"fastirt {command}: rank {ranks.rank}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        gone = ranks.explain(error)
        code, linger = 2 if gone else 1, gone is not None
        if gone:
            print(f"fastirt {command}: rank {ranks.rank}: error: {gone}", file=sys.stderr)
        elif type(error).__name__ == "OutOfMemoryError":
            code = 2
            print(
                f"fastirt {command}: rank {ranks.rank}: error: the GPU is out of memory: lower --batch-size",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
    return ranks.leave(code, linger)
