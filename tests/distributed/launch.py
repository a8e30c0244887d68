"""Starts several ranks of a script on this machine, as torchrun would, without its agent."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers import ROOT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(size: int, *command: str, **environment: str) -> list[subprocess.Popen]:
    """One process a rank: `python COMMAND` in the root of the repository, output to pipes."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """(exit code, output) of each rank; all are killed at the first that takes too long."""
    end = time.monotonic() + timeout
    found = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1, end - time.monotonic()))
            found.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    return found


def run(size: int, *command: str, timeout: float = 240, **environment: str) -> list[str]:
    """The output of each rank; an assertion where one fails."""
    found = finish(start(size, *command, **environment), timeout)
    assert all(code == 0 for code, _ in found), "\n".join(output[-3000:] for _, output in found)
    return [output for _, output in found]


def torchrun(
    size: int, *command: str, options: tuple[str, ...] = (), stdout: Any = subprocess.PIPE, **environment: str
) -> subprocess.Popen:
    """A job under torchrun's agent; `command` is a script, or "-m" and a module, and its
    arguments."""
    module = command[0] == "-m"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *options]
        + (["-m", "--", *command[1:]] if module else ["--", *command]),
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def children(pid: int) -> list[int]:
    """Processes that a process has started and that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:  # it has ended meanwhile
            pass
    return found


def workers(agent: int) -> dict[int, int]:
    """Rank to process, of the ranks that an agent has started."""
    found = {}
    for pid in children(agent):
        try:
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
        except OSError:
            continue
        if rank:
            found[int(rank[1])] = pid
    return found
