"""A small training job: its command, how it is started, and how two of its runs are compared."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import torchrun
from tests.helpers import ROOT, TINY, folder_flags, loss_rows

NAMES = ("step", "lr", "loss", "contrastive_batch", "contrastive_memory", "koleo", "grad_norm")


def arguments(data: Path, out: Path, *more: str, steps: int = 20) -> list[str]:
    flags = (
        f"--recipe unofficial --max-iter {steps} --batch-size 8 --m-per-class 2 --opt sgd --lr 3e-4 --rank 1 "
        "--logging-freq 2 --save-freq 5 --encoder-momentum 0.9 --memory-start 3 --eval-batch-size 5"
    )
    return ["train", *folder_flags(data), "--output-dir", str(out), *TINY, *flags.split(), *more]


def alone(*arguments: str) -> str:
    """The output of one process without torchrun."""
    command = [sys.executable, "-m", "fastirt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def job(size: int, *command: str, code: int | None = 0, timeout: float = 120, **given) -> str:
    """A torchrun job that must end with `code` (None: any error); its output."""
    process = torchrun(size, *command, **given)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code or (code is None and process.returncode), (process.returncode, output[-4000:])
    return output


def faulty(kind: str, at: int, rank: int, *arguments: str) -> list[str]:
    """`fastirt ARGUMENTS` in which one rank meets a fault, for `job`."""
    return ["-m", "tests.distributed.faulty", kind, str(at), str(rank), *arguments]


def curve(out: Path) -> list[dict]:
    return [{name: row[name] for name in NAMES} for row in loss_rows(out)]


def assert_same_curve(found: Path, expected: Path) -> None:
    """Up to float32 rounding in another order of summation. The optimizer is SGD: AdamW amplifies
    rounding threefold a step here, to 3e-3 of the loss after 20."""
    ours, theirs = curve(found), curve(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
