"""Ranks meet in a store that holds what an earlier attempt left in it."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastirt.distributed.rendezvous import rendezvous

SOON = timedelta(seconds=20)


def attempt(store: dist.Store, size: int, late: int | None = None) -> list[str]:
    """What each of `size` ranks finds under a key that each wrote, all in one meeting."""
    found: list = [None] * size

    def rank(number: int) -> None:
        mine = rendezvous(store, number, size, SOON)
        mine.set(f"address/{number}", f"{id(found)} {number}")
        found[number] = [mine.get(f"address/{other}").decode() for other in range(size)]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for number, thread in enumerate(threads):
        if number != late:
            thread.start()
    if late is not None:
        threads[late].start()
    for thread in threads:
        thread.join()
    assert found == [[f"{id(found)} {number}" for number in range(size)]] * size
    return found[0]


@pytest.mark.parametrize("late", [0, 1, 3])
def test_each_attempt_is_by_itself(late):
    store = dist.HashStore()
    for _ in range(4):
        attempt(store, 4, late)


def test_words_of_ranks_that_died_are_not_taken_for_new_ones():
    store = dist.HashStore()
    # rank 1 came, rank 0 did not
    with pytest.raises(RuntimeError, match="not all of 2 ranks came"):
        rendezvous(store, 1, 2, timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="not all"):  # rank 0 came and heard the dead rank 1
        rendezvous(store, 0, 2, timedelta(seconds=0.1))
    attempt(store, 2)
