"""Self-check: before a GPU is first used, its custom kernels run beside their plain twins.

Once a machine: results are kept in a JSON file in the user's cache folder. A kernel that deviates,
fails or hangs is replaced by its twin. The check itself is `fastirt.kernels.passes.self_check`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

import torch
import triton

from fastirt.atomic import atomic_write
from fastirt.config.options import Config
from fastirt.distributed.ranks import Ranks
from fastirt.errors import first_line
from fastirt.kernels.checks import REPLACED
from fastirt.kernels.passes.self_check import GROUPS, code_digest

log = logging.getLogger("fastirt")

START_LIMIT = 120.0  # seconds until a process has imported torch and reached the GPU
KERNEL_LIMIT = 60.0  # seconds for one kernel; compilation takes most of it
TOO_LATE = "does not return within"
Results = dict[str, list[str]]  # kernel: [status, detail]


def replace_faulty_kernels(config: Config, ranks: Ranks) -> None:
    """Check the kernels unless this machine has done so; the faulty ones give way to their twins.

    Does nothing on a CPU. All ranks call it, and all follow rank 0's GPU: with other kernels they
    would not have the same bits.
    """
    device = torch.device(config.run.device)
    REPLACED.clear()
    enabled = device.type == "cuda" and config.run.self_check == "on"
    if not (enabled or ranks.is_distributed):
        return
    # Distributed: also with the check off or on a CPU, since other ranks may have other settings.
    results = ranks.host.run_on_main(lambda: _check_without_raising(device) if enabled else {})
    faults = _with_status(results, "failed")
    REPLACED.update(faults)
    if not ranks.is_main:
        return
    if faults:
        log.warning(
            "self-check: %s: plain PyTorch is used instead, which is slower; please report this line with the output "
            "of `fastirt env` (.github/ISSUE_TEMPLATE/bug.yml); --self-check off uses the kernels anyway",
            _listed(faults),
        )
    elif unchecked := _with_status(results, "unchecked"):
        log.warning("self-check: could not run, the kernels are used unchecked: %s", _listed(unchecked))


def _check_without_raising(device: torch.device) -> Results:
    """`check_once`, but an error of the check itself is a result, not the end of the run."""
    try:
        return check_once(device)
    except Exception as error:
        return {"all": ["unchecked", f"{type(error).__name__}: {first_line(error)}"]}


def check_once(device: torch.device) -> Results:
    """The cached results for this device and code, or new ones, which are then cached."""
    key = machine_key(device)
    if (entry := read_cache().get(key)) is not None:
        return entry["kernels"]
    log.info("self-check: runs each custom kernel beside plain PyTorch, once on this machine (%s)", key)
    start = time.monotonic()
    results = run_checks(str(device))
    log.info("self-check: %.0f s: %s", time.monotonic() - start, summarize(results))
    keep(device, results)
    return results


def keep(device: torch.device, results: Results) -> None:
    """Add results to the cache, but not those of a busy GPU: it is checked again next time."""
    details = [detail.lower() for detail in _with_status(results, "failed").values()]
    busy = any(TOO_LATE in detail or "out of memory" in detail for detail in details)
    if not busy and not _with_status(results, "unchecked"):
        _add_to_cache(machine_key(device), results)


def run_checks(device: str, limit: float = math.inf) -> Results:
    """Run each group of kernels in a process of its own, all at once; end those that hang.

    limit: seconds in all.
    """
    ends = time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_Child(device, names)) for names in GROUPS]
        # A list: `any` of a generator would leave the time of the others unwatched.
        while any([child.is_running(ends) for child in children]):
            time.sleep(0.05)
        return {name: result for child in children for name, result in child.results().items()}


class _Child:
    """A process that checks some kernels one after the other; leaving the context ends it."""

    def __init__(self, device: str, names: tuple[str, ...]) -> None:
        self.command = [sys.executable, "-m", "fastirt.kernels.passes.self_check", device, *names]
        self.names = names
        self.exit: Optional[str] = None

    def __enter__(self) -> "_Child":
        # Files, not pipes: a compiler that outlives a killed process would keep a pipe open.
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self._count, self._since = 0, time.monotonic()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            # The driver may hold on to a process whose kernel hangs: it is left behind then.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        self._out.close()
        self._err.close()

    def is_running(self, ends: float = math.inf) -> bool:
        """False once the process has given all results, has ended, or exceeds its time or the
        monotonic clock's `ends`."""
        count = len(self._lines())
        if self.exit is not None or count > len(self.names):  # one line says that it is ready
            return False
        if (code := self._process.poll()) is not None:
            lines = self._read(self._err).strip().splitlines()
            self.exit = f"ends with exit code {code}" + (f" ({lines[-1][:200]})" if lines else "")
            return False
        if count > self._count:
            self._count, self._since = count, time.monotonic()
        limit = min(KERNEL_LIMIT if self._count else START_LIMIT, ends - self._since)
        if time.monotonic() - self._since > limit:
            self.exit = f"{TOO_LATE} {max(limit, 0):.0f} s"
            return False
        return True

    def results(self) -> Results:
        lines = self._lines()
        found = {line["kernel"]: [line["status"], line["detail"]] for line in lines if "kernel" in line}
        status = "failed" if lines else "unchecked"  # no line at all: not even the GPU was reached
        for name in self.names:
            found.setdefault(name, [status, str(self.exit)])
        return found

    def _lines(self) -> list[dict[str, Any]]:
        complete = self._read(self._out).split("\n")[:-1]
        return [json.loads(line) for line in complete if line.startswith("{")]

    @staticmethod
    def _read(file: Any) -> str:
        # pread, since the process writes at the file's own position, which reading would move.
        return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")


def summarize(results: Results) -> str:
    """One line: which kernels agree with plain PyTorch, and what is wrong with the others."""
    count = sum(status in ("ok", "unused") for status, _ in results.values())
    faults = {name: detail for name, (status, detail) in results.items() if status in ("failed", "unchecked")}
    return f"{count} of {len(results)} kernels pass" + (f"; {_listed(faults)}" if faults else "")


def describe_cache() -> str:
    """The cached results of each GPU in one line, for `fastirt env`."""
    cache = read_cache()
    keys = dict.fromkeys(machine_key(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    found = [
        f"{summarize(cache[key]['kernels'])} ({cache[key]['date']})" if key in cache else "not run" for key in keys
    ]
    return "; ".join(dict.fromkeys(found)) or "no GPU"


def machine_key(device: torch.device) -> str:
    """What the results depend on: device, driver, torch, Triton and the kernels' code."""
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)} ({major}.{minor}), driver {_driver()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, kernels {code_digest()[:16]}"
    )


def _driver() -> str:
    with contextlib.suppress(OSError):
        if version := re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text()):
            return version.group()
    return str(torch._C._cuda_getDriverVersion())


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "fastirt" / "self_check.json"


def read_cache() -> dict[str, dict[str, Any]]:
    """{machine_key: {"date", "kernels": Results}}; empty without a readable file."""
    try:
        cache = json.loads(cache_file().read_text())
        return {key: entry for key, entry in cache.items() if {"date", "kernels"} <= entry.keys()}
    except (OSError, ValueError, AttributeError):
        return {}


def _add_to_cache(key: str, results: Results) -> None:
    file = cache_file()
    cache = {**read_cache(), key: {"date": time.strftime("%Y-%m-%d"), "kernels": results}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(cache, indent=1) + "\n")
    except OSError as error:
        log.info("self-check: cannot keep its results (%s): the next run checks again", error)


def _with_status(results: Results, status: str) -> dict[str, str]:
    return {name: detail for name, (found, detail) in results.items() if found == status}


def _listed(details: dict[str, str]) -> str:
    """ "a, b: detail; c: detail": kernels with the same detail together."""
    kernels: dict[str, list[str]] = {}
    for name, detail in details.items():
        kernels.setdefault(detail, []).append(name)
    return "; ".join(f"{', '.join(names)}: {detail}" for detail, names in kernels.items())
