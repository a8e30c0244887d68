"""How ranks meet in a store that may still hold keys of an earlier attempt of the job.

torchrun's agent keeps its store when it restarts workers, so gloo would find the addresses of dead
processes. Every attempt therefore uses a prefix of its own, which rank 0 proposes once it has heard
from every rank of this attempt.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL = 0.02  # seconds


def rendezvous(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A prefix of `store` for these `size` processes alone.

    Each rank publishes a fresh token; rank 0 publishes an invitation that lists the tokens it has
    seen; a rank that finds its token acknowledges; when all have acknowledged the same invitation,
    rank 0 publishes `go`. Raises RuntimeError after `timeout`.
    """
    store = dist.PrefixStore("fastirt", store)
    word, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"hello/{rank}", word)
    names = [f"hello/{r}" for r in range(size)]
    heard: list[str] = []
    welcome = ""
    while time.monotonic() < end:
        if rank == 0 and store.check(names):
            now = [store.get(name).decode() for name in names]
            if now != heard:
                heard, welcome = now, uuid.uuid4().hex
                store.set("welcome", json.dumps([welcome, heard]))
        elif rank and store.check(["welcome"]):
            offered, words = json.loads(store.get("welcome"))
            welcome = offered if words[rank : rank + 1] == [word] else ""
        if welcome:
            store.set(f"{welcome}/nod/{rank}", "")
            if rank == 0 and store.check([f"{welcome}/nod/{r}" for r in range(size)]):
                store.set(f"{welcome}/go", "")
            if store.check([f"{welcome}/go"]):
                return dist.PrefixStore(welcome, store)
        time.sleep(POLL)
    raise RuntimeError(f"not all of {size} ranks came within {timeout}")
