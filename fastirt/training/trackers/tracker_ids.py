"""trackers.json of a run: under which id each tracker knows it, so that a resumed run goes on."""

from __future__ import annotations

import json
from typing import Any

from fastirt.atomic import atomic_write
from fastirt.config.run_files import RunFiles


def read_ids(files: RunFiles, tracker: str) -> dict[str, Any]:
    """What `write_ids` wrote for this tracker; empty where there is nothing readable."""
    try:
        ids = json.loads(files.trackers.read_text(encoding="utf-8"))[tracker]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return ids if isinstance(ids, dict) else {}


def write_ids(files: RunFiles, tracker: str, ids: dict[str, Any]) -> None:
    """Keep the tracker's entry; those of others stay. Trackers start one after the other."""
    try:
        tree = json.loads(files.trackers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = {}
    tree = {**(tree if isinstance(tree, dict) else {}), tracker: ids}
    with atomic_write(files.trackers) as temporary:
        temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
