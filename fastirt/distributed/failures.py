"""What ends a distributed job: a lost rank, or an error that rank 0 reports."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Optional, Sequence

import torch.distributed as dist

from fastirt.errors import UserError, first_line

EXIT_DELAY = 2.0  # seconds that survivors leave to torchrun to see which rank died first


class PeerLost(UserError):
    """Another rank ended or cannot be reached. Handlers must exit without saving a checkpoint."""


class ReportedByMainRank(UserError):
    """Raised on other ranks when rank 0 reports the error."""


def shared_error(message: str, rank: int) -> UserError:
    """An error that every rank raises and only rank 0 prints."""
    return UserError(message) if rank == 0 else ReportedByMainRank(message)


def as_peer_lost(error: BaseException, rank: int, peers: Sequence[dict[str, Any]]) -> Optional[PeerLost]:
    """The lost rank behind an exception of a collective; None for any other exception.

    peers: {"host", "pid"} of each rank.
    """
    text = str(error)
    if isinstance(error, UserError):
        return None
    if not isinstance(error, dist.DistError) and not any(w in text for w in ("gloo", "NCCL", "Connection closed")):
        return None
    lost = _ended_on_this_node(peers)
    if lost:
        who = ", ".join(f"rank {other} (pid {peers[other]['pid']})" for other in lost)
        return PeerLost(f"{who} exited unexpectedly; rank {rank} stops without saving: continue with --resume")
    elsewhere = sorted({peer["host"] for peer in peers} - {socket.gethostname()})
    place = f", perhaps on {' or '.join(elsewhere)}" if elsewhere else ""
    return PeerLost(
        f"another rank exited unexpectedly{place}; rank {rank} stops without saving: "
        f"continue with --resume ({first_line(error)})"
    )


def _ended_on_this_node(peers: Sequence[dict[str, Any]]) -> list[int]:
    """Ranks of this node whose process has ended.

    Waits up to a second: connections close before /proc shows the end.
    """
    host = socket.gethostname()
    for _ in range(10):
        ended = [rank for rank, peer in enumerate(peers) if peer["host"] == host and not _is_alive(peer["pid"])]
        if ended:
            return ended
        time.sleep(0.1)
    return []


def _is_alive(pid: int) -> bool:
    """Whether a process of this node runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def exit_now(code: int, linger: bool) -> NoReturn:
    """End this process at once, without tearing down what other ranks may have broken.

    linger: wait, so that torchrun sees first which rank died.
    """
    logging.shutdown()
    if linger:
        time.sleep(EXIT_DELAY)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
