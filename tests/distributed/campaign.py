"""Kills ranks of real jobs at random moments.

Usage: python -m tests.distributed.campaign --kills 20 --ranks 2 --out FILE

A round is two jobs in one run folder. The first has no restarts: when a rank gets SIGKILL, anywhere
between its first import and its last evaluation, the job must end within 60 seconds with an error
that names it. The second goes on from there under --max-restarts and loses a rank as well: it must
come back by itself, and end with the losses and, bit for bit, the weights of a run that nobody
disturbed. Rounds take the memory whole and in shards in turn. Exit code 1 where any of this does
not hold.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Optional

from tests.distributed.jobs import arguments, curve
from tests.distributed.launch import torchrun, workers
from tests.helpers import assert_same_weights, write_splits

STEPS, LIMIT = 200, 60.0  # optimiser steps of a run; seconds in which a job must end


def job(ranks: int, command: list[str], out: IO[str], options: tuple[str, ...] = ()) -> subprocess.Popen:
    return torchrun(ranks, "-m", "fastirt", *command, options=options, stdout=out)


def kill(process: subprocess.Popen, rank: int, after: float) -> bool:
    """SIGKILL for a rank so many seconds after it has started; False where the job had ended."""
    while process.poll() is None and rank not in workers(process.pid):
        time.sleep(0.02)
    end = time.monotonic() + after
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    pid: Optional[int] = workers(process.pid).get(rank)
    if process.poll() is not None or pid is None:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def moment(out: Path, log: str) -> str:
    """Where a run was when it was killed."""
    rows = curve(out) if re.search(r"step \d+/", log) else []
    if not rows:
        return "starting"
    return f"step {rows[-1]['step']}" + (", evaluating" if rows[-1]["step"] == STEPS else "")


def named(log: str, rank: int) -> str:
    """Who said which rank is gone."""
    if re.search(rf"error: .*rank {rank} \(pid \d+\)", log):
        return "the other ranks"
    if re.search(rf"rank\s+: {rank} \(local_rank: {rank}\)\s+exitcode\s+: -9", log):
        return "torchrun"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="rounds; each kills twice (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the log there")
    args = parser.parse_args()
    said: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        said.append(line)
        if args.out:
            args.out.write_text("\n".join(said) + "\n")

    failures, draw = 0, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_splits(root / "data", (9, 6), (6, 4))

        def command(out: Path, layout: str) -> list[str]:
            more = ["--resume", "--eval-freq", "70", *(["--memory-sharded"] if layout == "sharded" else [])]
            return arguments(root / "data", out, *more, steps=STEPS)

        took = {}
        for layout in ("whole", "sharded"):
            start = time.monotonic()
            with open(root / f"{layout}.txt", "w") as log:
                assert job(args.ranks, command(root / layout, layout), log).wait(300) == 0, log.name
            took[layout] = time.monotonic() - start
            say(f"undisturbed, memory {layout}: {took[layout]:.1f} s, {STEPS} steps, {args.ranks} ranks")
        number = 0
        while number < args.kills:
            layout, rank = ("whole", "sharded")[number % 2], draw.randrange(args.ranks)
            out, log = root / f"run-{number}", root / f"run-{number}.txt"
            with open(log, "w") as file:
                process = job(args.ranks, command(out, layout), file)
                if not kill(process, rank, draw.uniform(0, took[layout])):
                    process.wait(300)
                    subprocess.run(["rm", "-rf", out])
                    continue  # it had ended: draw again
                start = time.monotonic()
                try:
                    code = process.wait(2 * LIMIT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = 0
            ended, text = time.monotonic() - start, log.read_text()
            good = bool(code) and ended < LIMIT and bool(named(text, rank))
            line = (
                f"kill {number + 1}: rank {rank}, memory {layout}, {moment(out, text)}: "
                f"ended in {ended:.1f} s with exit code {code}, "
                f"named by {named(text, rank) or 'NOBODY'}"
            )
            rank = draw.randrange(args.ranks)
            with open(root / "again.txt", "w") as file:
                process = job(args.ranks, command(out, layout), file, ("--max-restarts=2",))
                killed = kill(process, rank, draw.uniform(0, took[layout]))
                code = process.wait(300)
            try:
                assert code == 0, (root / "again.txt").read_text()[-3000:]
                assert_same_weights(out, root / layout)
                assert curve(out) == curve(root / layout)
                line += f"; resumed{f', rank {rank} killed, restarted' if killed else ''}: weights and losses equal"
            except AssertionError as error:
                good = False
                line += f"; resumed: NOT EQUAL ({error})"
            failures += not good
            say(line)
            number += 1
    say(f"{args.kills} rounds, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
