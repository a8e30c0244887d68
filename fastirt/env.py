"""`fastirt env`: versions and hardware for bug reports.

A missing or broken package only affects its own line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Callable

ABSENT = "not installed"


def report() -> str:
    """One `name: value` line each for the program, the system, the GPUs and the main packages."""
    items: list[tuple[str, Callable[[], str]]] = [
        ("fastirt", _fastirt),
        ("Python", lambda: f"{platform.python_version()} ({sys.executable})"),
        ("OS", platform.platform),
        ("CPU", _cpu),
        ("cores", _cores),
        ("memory", _memory),
        ("GPU", _gpus),
        ("torch", _torch),
        ("CUDA (torch)", _cuda),
        ("cuDNN (torch)", _cudnn),
        ("triton", lambda: _version("triton")),
        ("timm", lambda: _version("timm")),
        ("torchvision", lambda: _version("torchvision")),
        ("DALI", lambda: _family("nvidia-dali")),
        ("faiss", _faiss),
        ("numpy", lambda: _version("numpy")),
        ("Pillow", lambda: _version("pillow")),
        ("apex", _apex),
        ("self-check", _self_check),
    ]
    lines = []
    for name, value in items:
        try:
            text = value()
        except BaseException as error:  # importing a broken installation may raise anything
            if isinstance(error, KeyboardInterrupt):
                raise
            text = f"failed: {type(error).__name__}: {error}"
        lines.append(f"{name + ':':15} " + " ".join(text.split()))
    return "\n".join(lines)


def _fastirt() -> str:
    folder = Path(__file__).resolve().parent
    package = importlib.import_module(__package__)
    version = getattr(package, "__version__", None) or _version("fastirt")
    # Only of a repository that tracks this file, not of one that contains an installation.
    if _run("git", "-C", str(folder), "ls-files", "--error-unmatch", "env.py") is None:
        return version
    commit = _run("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = _run("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{version}, commit {commit}{' with local changes' if changed else ''}"


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return f"{platform.machine()}, {line.split(':', 1)[1].strip()}"
    return f"{platform.machine()} {platform.processor()}"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _memory() -> str:
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _gpus() -> str:
    listed = _run("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if not listed:
        return "none found (nvidia-smi is missing or lists none)"
    return "; ".join(
        f"{i}: {name}, {memory}, driver {driver}"
        for i, (name, memory, driver) in enumerate(line.split(", ") for line in listed.splitlines())
    )


def _torch() -> str:
    if importlib.util.find_spec("torch") is None:
        return ABSENT
    torch = importlib.import_module("torch")
    return f"{torch.__version__}, {torch.cuda.device_count()} CUDA devices visible, {torch.get_num_threads()} threads"


def _cuda() -> str:
    if importlib.util.find_spec("torch") is None:
        return ABSENT
    torch = importlib.import_module("torch")
    usable = "usable" if torch.cuda.is_available() else "not usable here"
    return f"{torch.version.cuda or 'a build without CUDA'}, {usable}"


def _cudnn() -> str:
    if importlib.util.find_spec("torch") is None:
        return ABSENT
    return str(importlib.import_module("torch").backends.cudnn.version() or "none")


def _faiss() -> str:
    if importlib.util.find_spec("faiss") is None:
        return ABSENT
    faiss = importlib.import_module("faiss")
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else None
    return f"{_family('faiss')}, " + ("built without GPU support" if gpus is None else f"built for GPUs, {gpus} usable")


def _apex() -> str:
    # PyPI has an unrelated package of this name; only NVIDIA's has apex.optimizers.
    if importlib.util.find_spec("apex") is None:
        return ABSENT
    if importlib.util.find_spec("apex.optimizers") is None:
        return f"{_version('apex')}, not NVIDIA's"
    extensions = "with" if importlib.util.find_spec("amp_C") else "without"
    return f"{_version('apex')}, {extensions} its CUDA extensions"


def _self_check() -> str:
    """What the self-check of the kernels found on this machine's GPUs."""
    if importlib.util.find_spec("torch") is None:
        return ABSENT
    if not importlib.import_module("torch").cuda.is_available():
        return "no GPU"
    return importlib.import_module("fastirt.objective.self_check").describe_cache()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _family(prefix: str) -> str:
    """`name version` of the installed distributions with a prefix, such as nvidia-dali-cuda130."""
    names = {(d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()}
    return ", ".join(f"{n} {v}" for n, v in sorted(names.items()) if n.startswith(prefix)) or ABSENT


def _run(*command: str) -> str | None:
    """The output of a command, or None if it is missing, fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
