"""What ends a job of many ranks: a rank that is lost, an error that rank 0 reports."""

from __future__ import annotations

from pathlib import Path

from fastirt.errors import UserError

EXIT_DELAY = 2.0  # seconds that survivors leave to torchrun to see which rank died first


class PeerLost(UserError):
    """Another rank ended or cannot be reached. Handlers must exit without saving a checkpoint."""


class ReportedByMainRank(UserError):
    """Raised on other ranks when rank 0 reports the error."""


def _alive(pid: int) -> bool:
    """Whether a process of this node runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False
