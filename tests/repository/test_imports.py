"""Imports flow one way: a part of fastirt imports itself and parts below it."""

import ast
from collections import Counter
from pathlib import Path

import fastirt
import fastirt.kernels

ROOT = Path(fastirt.__file__).parent
# From the bottom up.
PARTS = (
    *("errors", "atomic", "env", "kernels", "config", "distributed", "datasets", "images", "loading", "model"),
    *("retrieval", "objective", "step", "training", "demo", "run_config", "inference", "gallery"),
    *("pages", "export", "commands", "tuning", "cli"),
)


def modules() -> dict[str, Path]:
    """Name without `fastirt.` to file; kernels have their folder beside fastirt's and import
    nothing of it."""
    files = [file for file in ROOT.rglob("*.py") if "kernels" not in file.relative_to(ROOT).parts]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: file for name, file in names.items() if name not in ("__init__", "__main__")}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of fastirt that a file imports while it runs; what only type checkers see does not
    count."""
    tree, found = ast.parse(file.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastirt."):
            base = node.module.removeprefix("fastirt.")
            found |= {inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastirt":
            found |= {alias.name for alias in node.names if alias.name in known}
    return found


def test_no_import_climbs():
    known = modules()
    climbing = []
    for name, file in known.items():
        part = name.split(".")[0]
        for other in imports(file, known):
            below = other.split(".")[0]
            if PARTS.index(below) > PARTS.index(part):
                climbing.append(f"{name} imports {other}")
    assert not climbing, climbing


def test_no_circles():
    known = modules()
    graph = {name: imports(file, known) & known.keys() - {name} for name, file in known.items()}
    while free := {name for name, others in graph.items() if not others}:
        graph = {name: others - free for name, others in graph.items() if name not in free}
    assert not graph, graph


def test_folders_and_the_root_stay_small():
    assert sum(file.suffix == ".py" for file in ROOT.iterdir()) <= 8
    files = [*ROOT.rglob("*.py"), *Path(fastirt.kernels.__path__[0]).rglob("*.py")]
    folders = Counter(file.parent for file in files if file.name != "__init__.py")
    assert max(folders.values()) <= 10, folders.most_common(3)
    long = {file.name: lines for file in files if (lines := len(file.read_text().splitlines())) > 250}
    assert not long, long
